"""Validation during training: held-out loss, retrieval, benchmarks, and answers to look at."""
