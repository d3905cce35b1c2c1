"""Checkpoints: their format, writing them during training, and resuming from them."""
