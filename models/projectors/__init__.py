"""Projectors: from the vision encoder's features to the language model's image tokens."""
