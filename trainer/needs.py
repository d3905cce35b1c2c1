"""What a stage needs of a model: FLOPs by part of whatever rows hold, by its objective.

Owns which count belongs to which objective. Does not own the counts (`trainer.flops`, `trainer.pair_flops`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from trainer.config import Frozen, ImageText, MultiToken, NextToken, Objective, StageConfig, TuningPlan
from trainer.flops import Counts, PartFlops, needed_flops
from trainer.pair_flops import pair_flops
from trainer.shapes import ModelShape

Needs = Callable[[Counts], dict[str, PartFlops]]


def stage_needs(stage: StageConfig, shape: ModelShape) -> Needs:
    """FLOPs by part as a function of what rows hold."""
    return _NEEDS[type(stage.objective)](stage.objective, stage.tune, shape)


def _next_token(objective: Objective, plan: TuningPlan, shape: ModelShape) -> Needs:
    del objective
    return lambda counts: needed_flops(replace(shape, future=None), plan, counts)


def _multi_token(objective: Objective, plan: TuningPlan, shape: ModelShape) -> Needs:
    del objective
    return lambda counts: needed_flops(shape, plan, counts)


def _image_text(objective: Objective, plan: TuningPlan, shape: ModelShape) -> Needs:
    assert isinstance(objective, ImageText)
    pairs = shape.pairs
    assert pairs is not None, "a recipe with another projector is refused"
    learns = not isinstance(plan.vision, Frozen)
    return lambda counts: pair_flops(shape.vision, pairs, objective.losses, counts, vision_learns=learns)


_NEEDS: dict[type, Callable[[Objective, TuningPlan, ModelShape], Needs]] = {
    NextToken: _next_token,
    MultiToken: _multi_token,
    ImageText: _image_text,
}
