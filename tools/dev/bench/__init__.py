"""Benchmarks against other implementations, in one run, on this machine."""
