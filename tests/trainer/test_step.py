"""One optimizer step with an engine of one weight: no process group, no model, milliseconds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from data_pipeline.sample import Row
from models.common.errors import InputError
from models.shapes import Counts
from tests.support.fakes import TEXT, FakeEngine, FakeStream, row
from trainer.config.schema import GuardConfig
from trainer.distributed.context import DistributedContext
from trainer.engine.loss_scale import LossScale
from trainer.guard import Guard
from trainer.micro_batches import MicroBatching
from trainer.schedule import Consumed
from trainer.step import GlobalBatch, OptimizerStep, Signals, StepTotals, next_batch

ALONE = DistributedContext()


class Reports:
    """What was said of samples whose numbers are not finite."""

    def __init__(self) -> None:
        self.told: list[tuple[list[str], str, str, int]] = []

    def report(self, suspects: list[Row], phase: str, consequence: str, batch: int) -> None:
        self.told.append(([sample.key for each in suspects for sample in each], phase, consequence, batch))


def make_step(
    engine: FakeEngine, reports: Reports | None = None, precision: str = "fp32", **more: Any
) -> OptimizerStep:
    return OptimizerStep(
        engine,
        guard=Guard(GuardConfig()),
        loss_scale=LossScale(precision),
        micro_batching=MicroBatching(TEXT, torch.device("cpu"), micro_rows=1, number=2, estimator=None),
        ranks=ALONE,
        nonfinite=reports or Reports(),
        seed_of=lambda num_steps: num_steps,
        **more,
    )


def batch_of(*rows: Row) -> GlobalBatch:
    return next_batch(FakeStream([list(rows)]), ALONE)  # type: ignore[arg-type]


def test_a_sound_batch_updates_once_after_all_micro_batches() -> None:
    engine, seen = FakeEngine(), []
    result = make_step(engine).take(batch_of(row(0), row(1)), Consumed(), 0.25, lambda: seen.append(engine.gradient))
    assert engine.calls == ["forward", "backward", "forward", "backward", "step"]
    assert (result.loss, result.totals.norm, result.is_step) == (1.0, 1.0, True)
    assert engine.factors == [0.25]
    assert seen == [1.0], "the gradient is there before the update"
    assert result.totals.counts.targets == 6


def test_a_loss_is_a_mean_over_targets_not_over_rows() -> None:
    engine = FakeEngine({"0": 2.0})
    result = make_step(engine).take(batch_of(row(0), row(1)), Consumed(), 1.0)
    assert result.loss == (3 * 2.0 + 3 * 1.0) / 6


def test_a_bad_row_is_left_out_named_and_the_step_is_that_of_the_others() -> None:
    engine, reports = FakeEngine({"0": math.nan}), Reports()
    result = make_step(engine, reports).take(batch_of(row(0), row(1)), Consumed(batches=7), 1.0)
    assert result.is_step
    assert result.loss == 1.0
    assert [[sample.key for sample in each] for each in result.left_out] == [["0"]]
    assert reports.told == [(["0"], "forward", "a row is left out", 8)]
    assert engine.calls.index("discard") < engine.calls.index("step")
    alone = FakeEngine()
    make_step(alone).take(batch_of((), row(1)), Consumed(), 1.0)
    assert alone.weight == engine.weight


def test_a_gradient_that_is_not_finite_skips_the_step_and_changes_nothing() -> None:
    engine, reports = FakeEngine(), Reports()
    engine.gradient_factor = math.inf
    result = make_step(engine, reports).take(batch_of(row(0), row(1)), Consumed(), 1.0)
    assert result.decision.action == "skip"
    assert engine.weight == 1.0
    assert engine.calls[-1] == "discard"
    assert reports.told == [(["0", "1"], "backward", "the step is skipped", 1)]


def test_an_overflow_in_fp16_is_computed_again_at_half_the_scale() -> None:
    engine = FakeEngine()
    backward = engine.backward

    def overflowing(loss_sum: torch.Tensor, num_targets: float, scale: float = 1.0) -> None:
        backward(loss_sum * (math.inf if scale > 2.0**15 else 1.0), num_targets, scale)

    engine.backward = overflowing  # type: ignore[method-assign]
    step = make_step(engine, precision="fp16")
    result = step.take(batch_of(row(0), row(1)), Consumed(), 1.0)
    assert result.is_step
    assert step._loss_scale.value == 2.0**15
    assert engine.weight == pytest.approx(0.99), "the scale is divided out again"


def test_dropout_is_seeded_by_the_step_so_that_a_second_pass_is_the_same() -> None:
    drawn: list[float] = []

    class Dropping(FakeEngine):
        def forward(self, batch: Any, *, is_last: bool) -> Any:
            drawn.append(float(torch.rand(())))
            return super().forward(batch, is_last=is_last)

    make_step(Dropping({"0": math.nan})).take(batch_of(row(0), row(1)), Consumed(steps=5), 1.0)
    assert drawn[:2] == drawn[2:], "the pass without the bad row draws what the first one drew"


def test_it_hears_of_stops_and_written_files_in_the_one_sum() -> None:
    signals = Signals(should_stop=lambda: True, is_written=lambda: False)
    result = make_step(FakeEngine(), signals=signals).take(batch_of(row(0), row(1)), Consumed(), 1.0)
    assert (result.totals.num_stops, result.totals.num_written) == (1.0, 0.0)


def test_data_that_cannot_be_used_raise_on_every_rank() -> None:
    stream = FakeStream([])

    def broken() -> list[Row]:
        raise InputError("too many bad samples")

    stream.next_rows = broken  # type: ignore[method-assign]
    with pytest.raises(InputError, match="too many bad samples"):
        next_batch(stream, ALONE)  # type: ignore[arg-type]


def test_the_norm_is_that_of_all_groups() -> None:
    totals = StepTotals(0, 0, 0, 0, 0, 0, 0, Counts(0, 0, 0, 0, 0), (9.0, 16.0))
    assert totals.norm == 5.0
    assert math.isnan(StepTotals(0, 0, 0, 0, 0, 0, 0, Counts(0, 0, 0, 0, 0), (math.nan,)).norm)
