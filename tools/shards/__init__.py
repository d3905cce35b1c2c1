"""Shard sets from raw data: fetch, make, index, check, show."""
