"""Measurements against peers, in one run, on this machine."""
