"""One training run: recipe -> engine -> loop -> checkpoint."""
