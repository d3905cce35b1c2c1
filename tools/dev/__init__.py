"""For maintainers: benchmarks, and faults injected into a run."""
