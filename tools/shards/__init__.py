"""Shard sets from raw data: make, index, check, show."""
