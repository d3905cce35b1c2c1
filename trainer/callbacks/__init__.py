"""Callbacks around the steps of a stage: checks, metrics, diagnostics, validation, checkpoints."""
