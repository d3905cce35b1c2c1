"""A package apart from this project that brings a projector and an objective, a file each."""
