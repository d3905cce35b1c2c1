"""Inference (`Predictor` and its decoding), and the benchmarks in `eval.tasks`."""

import sightline_packages

sightline_packages.check()
