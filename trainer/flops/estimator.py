"""The FLOPs estimator of a stage: FLOPs by part of the model, as a function of the rows' counts.

Owns the function that is passed around. The stage's objective defines what is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from models.shapes import Counts, ModelShape, PartFlops
from trainer.config.schema import StageConfig

FlopsEstimator = Callable[[Counts], dict[str, PartFlops]]
"""Counts of rows -> FLOPs of a forward and backward, by part of the model."""


def flops_estimator(stage: StageConfig, shape: ModelShape) -> FlopsEstimator:
    """The estimator of a stage's objective for a model's shapes."""
    return partial(stage.objective.flops, shape, stage.tune)
