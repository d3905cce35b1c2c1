"""A small real run, killed at random times until it finishes, compared with an undisturbed one."""
