"""Multi-token prediction: heads for tokens beyond the next one, on top of any causal language model."""
