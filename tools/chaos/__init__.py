"""A small real run, killed at random until it is done, compared with one that nobody touched."""
