"""Makes numbers of one sample not finite, or one batch's loss leap, in a stage that is about to run."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.sample import Row
from models.patch_plan import PatchPlan
from tests.support.native import MERGE


class _NanGradient(torch.autograd.Function):
    """Identity whose gradient is not a number."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, torch.nan)


def poison(stage: Any, *evils: tuple[str, Literal["picture", "loss", "gradient"]]) -> None:
    """From now on these samples give NaN: in their image's features, in their loss, or only in the gradient."""
    module = stage.services.engine.module
    present: list[str] = []
    plans: list[PatchPlan | None] = []

    def look(_: Any, arguments: tuple[Batch, ...]) -> None:
        present[:] = [key for row in arguments[0].keys for key in row]
        plans[:] = [arguments[0].images.plan]

    def spoil(place: str, key: str) -> Any:
        def hook(_: Any, __: Any, outputs: Tensor | tuple[Tensor, ...]) -> Any:
            if key not in present:
                return outputs
            if isinstance(outputs, tuple):  # at native resolution, of which the first has all images' tokens
                return spoilt_by(outputs[0]), *outputs[1:]
            return spoilt_by(outputs)

        def spoilt_by(output: Tensor) -> Tensor:
            if place == "gradient":
                return cast("Tensor", _NanGradient.apply(output))
            spoilt = output.clone()
            spoilt[_rows_of(present.index(key), plans[0]) if place == "picture" else ...] = torch.nan
            return spoilt

        return hook

    module.register_forward_pre_hook(look)
    for key, place in evils:
        part = module.vlm.projector if place != "loss" else module.vlm.language.get_output_embeddings()
        part.register_forward_hook(spoil(place, key))


def _rows_of(sample: int, plan: PatchPlan | None) -> int | slice:
    """Where the features of a sample are that has one image, as all samples have."""
    if plan is None:
        return sample
    first = sum(plan.lengths[:sample]) // MERGE**2
    return slice(first, first + plan.lengths[sample] // MERGE**2)


def leave_out(stage: Any, key: str, batch: int) -> None:
    """The same run without the sample `key`, whose row is empty, and without a global batch, counted from 1."""
    leave_out_batches(stage, batch, batch)
    rows = stage.state.stream.next_rows

    def next_rows() -> list[Row]:
        return [() if any(sample.key == key for sample in row) else row for row in rows()]

    stage.state.stream.next_rows = next_rows


def leave_out_batches(stage: Any, first: int, last: int) -> None:
    """The same run without global batches `first` to `last`, counted from 1: what they hold is drawn and dropped."""
    rows, number = stage.state.stream.next_rows, [0]

    def next_rows() -> list[Row]:
        number[0] += 1
        while first <= number[0] <= last:
            rows()
            number[0] += 1
        return list(rows())

    stage.state.stream.next_rows = next_rows


def leap(stage: Any, batch: int) -> None:
    """The loss of global batch `batch`, counted from 1, is 100 times what it would be."""
    forward = stage.services.engine.forward

    def leaping(*arguments: Any, **options: Any) -> Any:
        sums = forward(*arguments, **options)
        if stage.state.consumed.batches + 1 == batch:
            return sums._replace(loss_sum=100 * sums.loss_sum, row_loss_sums_B=100 * sums.row_loss_sums_B)
        return sums

    stage.services.engine.forward = leaping
