"""Inspection of existing runs: audit, replay, a snapshot of the code."""
