"""One optimizer step over the global batch: its inputs, its results, and the decision whether it is taken.

    rows -> micro-batches -> forward, backward ... -> one sum over the ranks -> decision -> step | skip | roll back
                  ^                                        |
                  +---- once more without the bad rows <---+

The loss is a sum divided by the number of targets of the whole global batch; so a gradient does not depend on how rows
are split into micro-batches and ranks. A row whose loss is not finite shows up in that sum: the gradient is discarded,
the row is emptied, and the step is computed again. A normal step has no extra cost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.sample import Row
from data_pipeline.stream import RowStream
from models.common.errors import AwayError, InputError
from models.shapes import Counts
from trainer.distributed.context import DistributedContext
from trainer.distributed.totals import Totals
from trainer.engine.loss_scale import LossScale
from trainer.flops.counts import count_rows
from trainer.guard import Guard, StepDecision
from trainer.micro_batches import MicroBatching
from trainer.objectives.loss_sum import LossSum
from trainer.schedule import Consumed


class TrainingEngine(Protocol):
    """The part of the engine that a step needs; `trainer.engine.engine.Engine` implements it, tests use a fake."""

    def forward(self, batch: Batch, *, is_last: bool) -> LossSum:
        """The sums of one micro-batch; `is_last` for the step's last one."""

    def backward(self, loss_sum: Tensor, num_targets: float, scale: float) -> None:
        """Add the gradient of scale * loss_sum / num_targets."""

    def squared_norms(self) -> list[float]:
        """This rank's share of each parameter group's squared gradient norm, after the last backward."""

    def step(self, factor: float, norm: float, scale: float) -> None:
        """Update the weights at `factor` times their peak learning rates, with the gradient clipped by its norm."""

    def discard(self) -> None:
        """Drop the gradient: weights and moments stay unchanged, bit for bit."""


@dataclass(frozen=True)
class BatchTotals(Totals):
    """Counts of the rows of a global batch, over all ranks."""

    num_targets: float
    num_samples: float
    num_draws: float
    """Samples drawn for it, including skipped ones and those that still wait for a row."""
    num_images: float
    num_faults: float = 0.0
    """Ranks whose data cannot be used."""


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's rows of a global batch, and the totals of all ranks."""

    rows: list[Row]
    totals: BatchTotals
    wait_s: float
    """How long this rank waited for its rows."""


@dataclass(frozen=True)
class StepTotals(Totals):
    """The sums of a pass over a global batch, over all ranks: everything that ranks exchange in a step."""

    loss_sum: float
    """In nats, over all targets."""
    num_correct: float
    num_samples: float
    num_positions: float
    """Positions that the micro-batches computed, padding included."""
    num_bad_rows: float
    """Rows whose loss is not finite."""
    num_stops: float
    """Ranks that were asked to stop."""
    num_written: float
    """Ranks that have written their files of the current checkpoint."""
    counts: Counts
    squared_norms: tuple[float, ...]
    """Of the gradient, per parameter group."""

    @property
    def norm(self) -> float:
        """The whole gradient's norm, rounded to fp32, which removes differences due to the order of summation."""
        total = sum(self.squared_norms)
        return float(np.float32(math.sqrt(total))) if total >= 0 else math.nan


@dataclass(frozen=True)
class Pass:
    """A forward and backward over a global batch: the totals, and the loss of each local row, summed over targets."""

    totals: StepTotals
    row_losses: list[float]


@dataclass(frozen=True)
class StepResult:
    """The outcome of a global batch."""

    decision: StepDecision
    totals: StepTotals
    loss: float
    """The mean over the targets, in nats."""
    row_losses: list[float]
    """Of the local rows, summed over their targets."""
    rows: list[Row]
    """This rank's rows that were used."""
    left_out: list[Row] = field(default_factory=list)
    """Local rows that were left out."""

    @property
    def is_step(self) -> bool:
        """Whether the weights were updated."""
        return self.decision.action == "step"


@dataclass(frozen=True)
class Signals:
    """Callbacks by which a step reports its phases and asks for requests to stop."""

    mark: Callable[[str], None] = lambda phase: None
    """Called with each phase that begins: the watchdog's heartbeat."""
    should_stop: Callable[[], bool] = lambda: False
    """Whether this rank was asked to stop."""
    is_written: Callable[[], bool] = lambda: True
    """Whether this rank has written its files of the current checkpoint."""
    can_go_back: Callable[[], bool] = lambda: False
    """Whether there is a checkpoint to roll back to."""


class NonFinitePolicy(Protocol):
    """Handling of samples with non-finite values; every rank calls it at the same place."""

    def report(self, suspects: list[Row], phase: str, consequence: str, batch: int) -> None:
        """Find the samples among `suspects` that caused it, log them, and never draw them again."""


def next_batch(stream: RowStream, ranks: DistributedContext) -> GlobalBatch:
    """Draw the rows of the next global batch.

    Raises:
        InputError: on every rank, if any rank has no usable data.
        AwayError: on every rank, if what any rank reads from is away; the rows that others drew are to be taken back.
    """
    started_s, drawn_before = time.monotonic(), stream.num_drawn
    rows: list[Row] = []
    fault, away = "", ""
    try:
        rows = stream.next_rows()
    except InputError as error:
        fault = str(error)
    except AwayError as error:
        away = str(error)
    wait_s = time.monotonic() - started_s
    samples = [sample for row in rows for sample in row]
    totals = BatchTotals(
        num_targets=_num_targets(rows),
        num_samples=len(samples),
        num_draws=stream.num_drawn - drawn_before,
        num_images=sum(len(sample.image_sizes) for sample in samples),
        num_faults=bool(fault or away),
    ).summed(ranks)
    if totals.num_faults:
        told = ranks.gather((fault, away))
        if faults := [found for found, _ in told if found]:
            raise InputError(faults[0])
        raise AwayError(next(found for _, found in told if found))
    return GlobalBatch(rows, totals, wait_s)


class OptimizerStep:
    """Computes global batches and updates the weights by them, unless the guard decides otherwise.

    Args:
        seed_of: the seed of dropout in a step, by the number of steps taken before it; differs between ranks.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        *,
        guard: Guard,
        loss_scale: LossScale,
        micro_batching: MicroBatching,
        ranks: DistributedContext,
        nonfinite: NonFinitePolicy,
        seed_of: Callable[[int], int],
        signals: Signals | None = None,
    ) -> None:
        self._engine, self._guard, self._loss_scale = engine, guard, loss_scale
        self._micro_batching, self._ranks, self._nonfinite = micro_batching, ranks, nonfinite
        self._seed_of, self._signals = seed_of, signals or Signals()

    def take(
        self,
        batch: GlobalBatch,
        consumed: Consumed,
        factor: float,
        before_update: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Compute a global batch and update the weights by it, at `factor` times their peak learning rates.

        After any other decision than "step" the gradient is discarded, and weights and moments are unchanged.
        `before_update` is called between the last backward and the update, when the gradient can be read.
        """
        rows, found = batch.rows, self._compute(batch.rows, batch.totals.num_targets, consumed)
        num_targets = batch.totals.num_targets
        left_out: list[Row] = []
        if found.totals.num_bad_rows > 0:
            rows, left_out = self._leave_out(rows, found, consumed)
            (num_targets,) = self._ranks.sum([float(_num_targets(rows))])
            found = self._compute(rows, num_targets, consumed)
        totals = found.totals
        loss = totals.loss_sum / num_targets if num_targets else math.nan
        decision = self._guard.decide(loss, totals.norm, can_go_back=self._signals.can_go_back())
        if decision.action == "step":
            before_update()
            self._engine.step(factor, totals.norm, self._loss_scale.value)
            self._loss_scale.count_step()
        else:
            self._engine.discard()
            if math.isfinite(loss) and not math.isfinite(totals.norm):
                self._trace(rows, "backward", "the step is skipped", consumed)
        return StepResult(decision, totals, loss, found.row_losses, rows, left_out)

    def _leave_out(self, rows: list[Row], found: Pass, consumed: Consumed) -> tuple[list[Row], list[Row]]:
        """The rows with the bad ones emptied, and the bad ones; discards the gradient, which is not finite."""
        self._engine.discard()
        is_bad = [not math.isfinite(loss) for loss in found.row_losses]
        left_out = [row for row, bad in zip(rows, is_bad, strict=True) if bad]
        self._trace(left_out, "forward", "a row is left out", consumed)
        self._guard.num_rows_left_out += int(found.totals.num_bad_rows)
        return [() if bad else row for row, bad in zip(rows, is_bad, strict=True)], left_out

    def _trace(self, suspects: list[Row], phase: str, consequence: str, consumed: Consumed) -> None:
        self._signals.mark("the search for the sample")
        self._nonfinite.report(suspects, phase, consequence, consumed.batches + 1)

    def _compute(self, rows: list[Row], num_targets: float, consumed: Consumed) -> Pass:
        """A pass at a loss scale under which the gradient does not overflow; at the original scale where none helps."""
        scale_before = self._loss_scale.value
        found = self._pass(rows, num_targets, consumed)
        while math.isfinite(found.totals.loss_sum) and not math.isfinite(found.totals.norm):
            if not self._loss_scale.halve():
                self._loss_scale.value = scale_before  # smaller scales do not help, so it was no overflow
                break
            self._engine.discard()
            found = self._pass(rows, num_targets, consumed)
        return found

    def _pass(self, rows: list[Row], num_targets: float, consumed: Consumed) -> Pass:
        """Forward and backward over this rank's micro-batches, then the one sum over all ranks."""
        torch.manual_seed(self._seed_of(consumed.steps))
        batches, number = self._micro_batching.split(rows), self._micro_batching.number
        sums = torch.zeros(2, dtype=torch.float64, device=self._micro_batching.device)
        row_sums, num_positions, scale = [], 0, self._loss_scale.value
        for index, batch in enumerate(batches):
            self._signals.mark("forward")
            found = self._engine.forward(batch, is_last=index + 1 == number)
            sums += torch.stack([found.loss_sum.detach().double(), found.num_correct.double()])
            row_sums.append(found.row_loss_sums_B)
            num_positions += batch.tokens.input_ids_BL.numel()
            self._engine.backward(found.loss_sum, max(num_targets, 1.0), scale)
        row_losses = batches.in_order(torch.cat(row_sums).tolist())
        loss_sum, num_correct = sums.tolist()
        local = StepTotals(
            loss_sum=loss_sum,
            num_correct=num_correct,
            num_samples=sum(len(row) for row in rows),
            num_positions=num_positions,
            num_bad_rows=sum(not math.isfinite(value) for value in row_losses),
            num_stops=self._signals.should_stop(),
            num_written=self._signals.is_written(),
            counts=count_rows(rows),
            squared_norms=tuple(square / scale**2 for square in self._engine.squared_norms()),
        )
        self._signals.mark("the sum over ranks")
        return Pass(local.summed(self._ranks), row_losses)


def _num_targets(rows: list[Row]) -> int:
    return sum(sample.num_targets for row in rows for sample in row)
