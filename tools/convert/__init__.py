"""Weights in other formats -> a model directory in Hugging Face format, which a recipe can name."""
