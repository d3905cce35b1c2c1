"""The whole chain on photos of the user's own, with two pretrained backbones from the package index, to a page."""
