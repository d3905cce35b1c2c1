"""Metrics of a run: files, loggers, throughput, diagnostics of layers and tokens."""
