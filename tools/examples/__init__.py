"""Worked examples that make their own data: the synthetic world, the quickstart, the model families."""
