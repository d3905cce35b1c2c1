"""A page to talk to a bundle: `python -m tools.demo BUNDLE`."""
