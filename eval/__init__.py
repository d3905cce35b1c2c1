"""A Predictor, and one file per benchmark."""
