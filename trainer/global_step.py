"""One optimizer step over the global batch: what it is made of, what it gives, and whether it is taken.

    rows -> micro-batches -> forward, backward ... -> one sum over the ranks -> verdict -> step | skip | roll back
                  ^                                        |
                  +---- once more without the bad rows <---+

The loss is a sum divided by the number of targets of the whole global batch; so a gradient does not depend on how rows
are split into micro-batches and ranks. A row whose loss is not finite is seen in that one sum: the gradient is thrown
away, the row is emptied, and the step is computed again. In a sound step that costs nothing.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, astuple, dataclass, field, fields
from typing import Literal

import numpy as np
import torch

from data_pipeline.feed import feed
from data_pipeline.sample import Row
from models.errors import InputError
from trainer.culprit import Culprit, find_culprits
from trainer.dealing import deal, in_order, row_costs, rows_of
from trainer.first_gradients import check_gradients
from trainer.flops import Counts, count_rows
from trainer.guard import Verdict
from trainer.insight import layer_histograms
from trainer.sinks import Histogram
from trainer.stage import Stage
from trainer.streams import stream_seed


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's rows of a global batch, and what all ranks' hold together."""

    rows: list[Row]
    targets: float
    samples: float
    draws: float
    """Samples drawn from the data for it, those passed over and those still waiting for a row included."""
    pictures: float
    wait_s: float
    """How long this rank waited for its rows."""


@dataclass
class Sums:
    """What a pass over a global batch gave, over all ranks."""

    loss: float
    correct: float
    samples: float
    positions: float
    """Of the micro-batches, padding included."""
    counts: Counts
    """Tokens, targets and what else the cost of a step follows from."""
    row_losses: list[float]
    """Of the local rows, summed over their targets."""
    num_bad_rows: float
    """Rows of all ranks whose loss is not finite."""
    squared_norms: list[float]
    """Of the gradient, per parameter group."""
    is_stop: bool
    """Whether any rank was asked to stop."""
    is_saved: bool
    """Whether every rank has written its share of the checkpoint on its way."""

    @property
    def norm(self) -> float:
        """The whole gradient's norm, in fp32: what is left of the order of summation is rounded away."""
        total = sum(self.squared_norms)
        return float(np.float32(math.sqrt(total))) if total >= 0 else math.nan


@dataclass
class StepResult:
    """What became of a global batch."""

    verdict: Verdict
    sums: Sums
    loss: float
    """The mean over the targets."""
    norm: float
    """The gradient's."""
    rows: list[Row]
    """This rank's rows that it was computed from."""
    left_out: list[Row]
    """Local rows that it was computed without."""
    histograms: dict[str, Histogram] = field(default_factory=dict)
    """Of weights and gradients, layer by layer, where this step was to be looked into."""


def next_batch(stage: Stage) -> GlobalBatch:
    """Draw the rows of the next global batch. Raises InputError on every rank where any of them cannot."""
    started_s, drawn_before = time.monotonic(), stage.stream.num_drawn
    rows, fault = [], ""
    try:
        rows = stage.stream.next_rows()
    except InputError as error:
        fault = str(error)
    wait_s = time.monotonic() - started_s
    samples = [sample for row in rows for sample in row]
    counts = [
        float(_num_targets(rows)),
        float(len(samples)),
        float(stage.stream.num_drawn - drawn_before),
        float(sum(len(sample.picture_sizes) for sample in samples)),
        float(bool(fault)),
    ]
    targets, num_samples, draws, pictures, num_faults = stage.ranks.sum(counts)
    if num_faults:
        raise InputError(next(found for found in stage.ranks.gather(fault) if found))
    return GlobalBatch(rows, targets, num_samples, draws, pictures, wait_s)


def take_step(stage: Stage, batch: GlobalBatch, rates: list[float]) -> StepResult:
    """Compute a global batch and update the weights by it, unless the guard says otherwise.

    After any other verdict than "step" the gradient is gone and weights and moments are as they were.
    """
    rows, targets = batch.rows, batch.targets
    sums = _compute(stage, rows, targets)
    left_out: list[Row] = []
    if sums.num_bad_rows > 0:
        stage.engine.discard()
        is_bad = [not math.isfinite(loss) for loss in sums.row_losses]
        left_out = [row for row, bad in zip(rows, is_bad, strict=True) if bad]
        _report(stage, _search(stage, left_out, "forward"), "a row is left out")
        stage.guard.num_rows_left_out += int(sums.num_bad_rows)
        rows = [() if bad else row for row, bad in zip(rows, is_bad, strict=True)]
        (targets,) = stage.ranks.sum([float(_num_targets(rows))])
        sums = _compute(stage, rows, targets)
    loss = sums.loss / targets if targets else math.nan
    norm = sums.norm
    can_go_back = stage.checkpoint is not None or stage.saver.is_busy
    verdict = stage.guard.judge(loss, norm, can_go_back=can_go_back)
    if verdict.action == "step":
        check_gradients(stage, has_pictures=batch.pictures > 0)
        histograms = _histograms(stage) if stage.insight.wants_histograms(stage.consumed.steps + 1) else {}
        stage.engine.step(rates, norm, stage.loss_scale.value)
        stage.loss_scale.count_step()
        return StepResult(verdict, sums, loss, norm, rows, left_out, histograms)
    stage.engine.discard()
    if math.isfinite(loss) and not math.isfinite(norm):
        _report(stage, _search(stage, rows, "backward"), "the step is skipped")
    return StepResult(verdict, sums, loss, norm, rows, left_out)


def _num_targets(rows: list[Row]) -> int:
    return sum(sample.num_targets for row in rows for sample in row)


def _compute(stage: Stage, rows: list[Row], num_targets: float) -> Sums:
    """A pass at a loss scale under which the gradient does not overflow; at the old one where none helps."""
    scale_before = stage.loss_scale.value
    sums = _pass(stage, rows, num_targets)
    while math.isfinite(sums.loss) and not math.isfinite(sums.norm):
        if not stage.loss_scale.halve():
            stage.loss_scale.value = scale_before  # it was no overflow
            break
        stage.engine.discard()
        sums = _pass(stage, rows, num_targets)
    return sums


def _pass(stage: Stage, rows: list[Row], num_targets: float) -> Sums:
    """Forward and backward over this rank's micro-batches; the sums over all ranks."""
    torch.manual_seed(stream_seed(stage.recipe.seed, stage.name, "dropout", stage.consumed.steps, stage.ranks.rank))
    size, number = stage.config.batch.micro_rows, stage.num_micro_batches
    parts = deal(row_costs(rows, stage.needs), size, number)
    totals = torch.zeros(2, dtype=torch.float64, device=stage.device)
    row_sums, positions, scale = [], 0, stage.loss_scale.value
    for index, batch in enumerate(feed(rows_of(rows, parts), stage.text, stage.device)):
        stage.watch.mark("forward", stage.consumed.batches + 1)
        sums = stage.engine.forward(batch, is_last=index + 1 == number)
        totals += torch.stack([sums.loss_sum.detach().double(), sums.num_correct.double()])
        row_sums.append(sums.row_loss_sums_B)
        positions += batch.input_ids_BL.numel()
        stage.engine.backward(sums.loss_sum, max(num_targets, 1.0), scale)
    row_losses = in_order(parts, torch.cat(row_sums).tolist())
    local = [
        *totals.tolist(),
        float(sum(len(row) for row in rows)),
        float(positions),
        float(sum(not math.isfinite(value) for value in row_losses)),
        float(stage.is_asked_to_stop()),
        float(stage.saver.is_written),
        *astuple(count_rows(rows)),
        *(square / scale**2 for square in stage.engine.squared_norms()),
    ]
    stage.watch.mark("the sum over ranks", stage.consumed.batches + 1)
    loss, correct, num_samples, num_positions, num_bad, stop, saved, *rest = stage.ranks.sum(local)
    held = len(fields(Counts))
    counts, norms = Counts(*rest[:held]), rest[held:]
    return Sums(
        loss, correct, num_samples, num_positions, counts, row_losses, num_bad, norms, stop > 0,
        saved == stage.ranks.world_size,
    )  # fmt: skip


def _histograms(stage: Stage) -> dict[str, Histogram]:
    """Of the weights before the step and of its gradient before clipping."""
    weights = layer_histograms(stage.engine.slices(), "weights/", stage.ranks)
    return weights | layer_histograms(stage.engine.own_gradients(), "gradients/", stage.ranks)


def _search(stage: Stage, suspects: list[Row], phase: Literal["forward", "backward"]) -> list[Culprit]:
    stage.watch.mark("the search for the culprit", stage.consumed.batches + 1)
    return find_culprits(
        stage.engine,
        suspects,
        phase=phase,
        text=stage.text,
        device=stage.device,
        ranks=stage.ranks,
    )


def _report(stage: Stage, culprits: list[Culprit], consequence: str) -> None:
    """Name the culprits, put them in quarantine, and never draw them again."""
    number = stage.consumed.batches + 1
    stage.stream.exclude((culprit.shard, culprit.key) for culprit in culprits)
    if not stage.ranks.is_first:
        return
    if not culprits:
        print(f"batch {number}: not finite, but no sample is so by itself; {consequence}", flush=True)
    for culprit in culprits:
        where = "output" if culprit.phase == "forward" else "gradient"
        reason = f"not finite in batch {number}: the {where} of {culprit.module}"
        print(f"rank {culprit.rank}: {culprit.shard} {culprit.key}: {reason}; {consequence}", flush=True)
        entry = asdict(culprit)
        stage.events.write({"event": "not finite", "batch": number, **entry})
        line = {"kind": "not_finite", "reason": reason, **{name: entry[name] for name in ("slot", "n", "shard", "key")}}
        stage.stream.note(line)
