"""The one loop: for every stage, objective and family.

    rows -> micro-batches -> count the targets of the whole global batch -> forward, backward -> step -> log -> save

A step divides the sum of losses by the number of targets of the whole global batch, known before the first backward;
so a gradient does not depend on how the rows are split into micro-batches and ranks.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from data_pipeline.batch import Batch, collate
from data_pipeline.sample import Row
from models.errors import InputError
from models.files import write_json
from trainer.checkpoint import remove_old
from trainer.schedule import multiplier, progress, warmup_share
from trainer.stage import Stage
from trainer.streams import stream_seed
from trainer.tracking import Metrics, ProgressLine, Tracker


@dataclass(frozen=True)
class Totals:
    """What one global batch holds, over all ranks."""

    targets: float
    samples: float
    tokens: float
    draws: float
    """Samples drawn from the data for it, those passed over and those still waiting for a row included."""


@dataclass
class Window:
    """Sums since the last log line."""

    started_s: float
    loss: float = 0.0
    correct: float = 0.0
    targets: float = 0.0
    samples: float = 0.0
    tokens: float = 0.0
    data_wait_s: float = 0.0


def fit(stage: Stage) -> None:
    """Run a stage from where it stands to its end, and mark it finished."""
    log = stage.recipe.tracking.log_every_steps
    tracker = _open_tracker(stage)
    line = ProgressLine(f"{stage.recipe.name}/{stage.name}")
    warmup = warmup_share(
        stage.config.schedule,
        stage.config.duration,
        epoch_samples=stage.stream.epoch_samples,
        rows=stage.config.batch.global_rows,
    )
    saved_at = stage.consumed.steps
    window = Window(time.monotonic())
    while not _is_over(stage):
        batches, totals, wait_s = _next_batches(stage)
        if totals.samples == 0:
            break  # every slot has run out: the last epoch is over
        factor = multiplier(stage.config.schedule, warmup, _progress(stage))
        rates = [group.learning_rate * factor for group in stage.groups]
        loss, correct, norm = _take_step(stage, batches, totals, rates)
        stage.consumed = stage.consumed.plus(
            samples=int(totals.samples), tokens=int(totals.tokens), draws=int(totals.draws)
        )
        _add(window, loss, correct, totals, wait_s)
        if tracker is not None and (stage.consumed.steps % log == 0 or stage.consumed.steps == 1):
            metrics = _metrics(stage, window, rates, norm)
            tracker.log(stage.consumed.steps, metrics)
            line.show(stage.consumed.steps, _progress(stage), metrics)
            window = Window(time.monotonic())
        if stage.consumed.steps % stage.config.checkpoint.every_steps == 0:
            _save(stage)
            saved_at = stage.consumed.steps
    if saved_at != stage.consumed.steps:
        _save(stage)
    _finish(stage)
    if tracker is not None:
        line.close()
        tracker.close()


def _open_tracker(stage: Stage) -> Tracker | None:
    if not stage.ranks.is_first:
        return None
    return Tracker(
        stage.directory,
        stage.recipe.tracking,
        title=f"{stage.recipe.name}/{stage.name}",
        recipe=stage.recipe.model_dump(mode="json"),
        resumed_at=stage.consumed.steps,
    )


def _is_over(stage: Stage) -> bool:
    """Whether the duration is used up; epochs end when the data does, since packed samples wait for their row."""
    return stage.config.duration.unit != "epochs" and _progress(stage) >= 1.0


def _progress(stage: Stage) -> float:
    return progress(stage.config.duration, stage.consumed, stage.stream.epoch_samples)


def _next_batches(stage: Stage) -> tuple[list[Batch], Totals, float]:
    """This rank's micro-batches of the next global batch, what all ranks' hold together, and the seconds waited."""
    started_s, drawn_before = time.monotonic(), stage.stream.num_drawn
    rows = stage.stream.next_rows()
    wait_s = time.monotonic() - started_s
    batches = [
        collate(part, stage.text) for part in _split(rows, stage.config.batch.micro_rows, stage.num_micro_batches)
    ]
    counts = [
        float(sum(batch.num_targets for batch in batches)),
        float(sum(batch.num_samples for batch in batches)),
        float(sum(batch.num_tokens for batch in batches)),
        float(stage.stream.num_drawn - drawn_before),
    ]
    return batches, Totals(*stage.ranks.sum(counts)), wait_s


def _split(rows: list[Row], micro_rows: int, num_micro_batches: int) -> list[list[Row]]:
    return [rows[index * micro_rows : (index + 1) * micro_rows] for index in range(num_micro_batches)]


def _take_step(stage: Stage, batches: list[Batch], totals: Totals, rates: list[float]) -> tuple[float, float, float]:
    """One optimizer step; the global sums of loss and of right predictions, and the gradient's norm.

    Nothing is stepped when the loss is not finite on any rank: the run stops with its last checkpoint as it was.
    """
    torch.manual_seed(stream_seed(stage.recipe.seed, stage.name, "dropout", stage.consumed.steps, stage.ranks.rank))
    loss_sum = torch.zeros((), dtype=torch.float64, device=stage.device)
    num_correct = torch.zeros((), dtype=torch.float64, device=stage.device)
    for index, batch in enumerate(batches):
        sums = stage.engine.forward(batch.to(stage.device))
        loss_sum += sums.loss_sum.detach()
        num_correct += sums.num_correct
        stage.engine.backward(sums.loss_sum, max(totals.targets, 1.0))
        if index + 1 < len(batches):
            stage.engine.end_micro_batch()
    loss, correct = stage.ranks.sum([float(loss_sum), float(num_correct)])
    if not math.isfinite(loss):
        _stop_on_bad_loss(stage, batches, float(loss_sum))
    return loss, correct, stage.engine.step(rates)


def _stop_on_bad_loss(stage: Stage, batches: list[Batch], local_loss: float) -> None:
    keys = [] if math.isfinite(local_loss) else [key for batch in batches for row in batch.keys for key in row]
    culprits = [f"rank {rank}: {', '.join(found[:8])}" for rank, found in enumerate(stage.ranks.gather(keys)) if found]
    raise InputError(
        f"step {stage.consumed.steps + 1}: the loss is not finite ({'; '.join(culprits)}); the last checkpoint is as "
        f"it was; lower the learning rate or look at these samples"
    )


def _add(window: Window, loss: float, correct: float, totals: Totals, wait_s: float) -> None:
    window.loss += loss
    window.correct += correct
    window.targets += totals.targets
    window.samples += totals.samples
    window.tokens += totals.tokens
    window.data_wait_s += wait_s


def _metrics(stage: Stage, window: Window, rates: list[float], norm: float) -> Metrics:
    elapsed_s = max(time.monotonic() - window.started_s, 1e-9)
    per_part = {f"learning_rate/{group.part}": rate for group, rate in zip(stage.groups, rates, strict=True)}
    return {
        "loss": window.loss / max(window.targets, 1.0),
        "token_accuracy": window.correct / max(window.targets, 1.0),
        "learning_rate": max(rates),
        **per_part,
        "gradient_norm": norm,
        "samples_per_s": window.samples / elapsed_s,
        "tokens_per_s": window.tokens / elapsed_s,
        "data_wait_share": window.data_wait_s / elapsed_s,
        "samples": float(stage.consumed.samples),
        "tokens": float(stage.consumed.tokens),
        "bad_samples": float(stage.stream.num_bad),
    }


def _save(stage: Stage) -> None:
    """Save; a checkpoint that could not be written is a loud line, not the end of the run."""
    try:
        stage.save()
    except OSError as error:
        if stage.ranks.is_first:
            print(f"warning: {error}; training goes on, older checkpoints are untouched", flush=True)
        return
    if stage.ranks.is_first:
        remove_old(stage.directory / "checkpoints", stage.config.checkpoint.keep)


def _finish(stage: Stage) -> None:
    checkpoint = stage.directory / "checkpoints" / f"step_{stage.consumed.steps:06d}"
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: the last checkpoint could not be written; free some space and start again")
    if stage.ranks.is_first:
        write_json(
            stage.directory / "finished.json", {"checkpoint": checkpoint.name, "samples": stage.consumed.samples}
        )
        print(
            f"{stage.recipe.name}/{stage.name}: finished after {stage.consumed.steps} steps; {checkpoint}", flush=True
        )
    stage.ranks.barrier()
