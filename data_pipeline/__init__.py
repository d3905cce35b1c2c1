"""Tar shards -> samples -> tokens and pixels -> packed batches."""
