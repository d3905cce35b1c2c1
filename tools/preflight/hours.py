"""How long a stage takes: optimizer steps by its duration, hours by the FLOPs that it needs.

Owns that arithmetic, and what is printed of it. FLOPs are computed by `trainer.flops`.
"""

from __future__ import annotations

import math

from models.shapes import Counts, ModelShape
from tools.preflight.data import Lengths, row_counts
from tools.preflight.machine import Machine
from tools.preflight.report import Report, gigabytes
from tools.preflight.wire import Traffic
from trainer.config.recipe import Recipe
from trainer.config.schema import StageConfig
from trainer.flops.estimator import flops_estimator
from trainer.flops.utilisation import peak_flops


def check_hours(
    recipe: Recipe,
    name: str,
    machine: Machine,
    report: Report,
    *,
    shape: ModelShape,
    lengths: Lengths,
    num_samples: int | None,
    step_traffic: Traffic,
) -> None:
    """Steps by the duration, hours by needed FLOPs and an assumed share of the peak, and by what goes over the wire.

    Where the steps follow from data that are not here, the time of a step and of 100,000 samples.
    """
    stage = recipe.stage(name)
    steps = num_steps(stage, lengths, num_samples)
    peak = peak_flops(machine.device)
    if steps is None:
        report.leave_out(f"{name}: steps: they follow from the data, which are not here")
    if peak is None:
        if steps is not None:
            report.fact(f"{steps:,} steps")
        report.leave_out(f"{name}: hours: the peak of {machine.device} is not known here")
        _tell_traffic(report, step_traffic, "")
        return
    row = row_counts(stage, lengths, worst=False)
    step = row.times(stage.batch.global_rows)
    flops = sum(part.total for part in flops_estimator(stage, shape)(step).values())
    step_s = flops / (peak * machine.peak_share * machine.num_gpus)
    assumed = f"at an assumed {machine.peak_share:.0%} of {machine.num_gpus} x {peak / 1e12:.0f} TFLOP/s"
    if steps is not None:
        hours, waiting = steps * step_s / 3600, steps * step_traffic.seconds / 3600
        report.fact(f"{steps:,} steps; {hours:.1f} hours, computed from {steps * flops:.2e} FLOPs {assumed}")
        _tell_traffic(report, step_traffic, f"; {hours + waiting:.1f} hours if computation hides none of it")
        return
    num_steps_100k = 100_000 * lengths.mean.tokens / step.tokens
    hours, waiting = num_steps_100k * step_s / 3600, num_steps_100k * step_traffic.seconds / 3600
    report.fact(
        f"a step: {step_s:.2f} s, computed from {flops:.2e} FLOPs {assumed}; 100,000 samples: {hours:.2f} hours"
        f" ({lengths.source})"
    )
    _tell_traffic(report, step_traffic, f"; {hours + waiting:.2f} hours for those if computation hides none of it")


def _tell_traffic(report: Report, step: Traffic, consequence: str) -> None:
    if step.num_gpus > 1:
        report.fact(
            f"over the wire, a GPU and step: {gigabytes(step.gathered)} gathered, {gigabytes(step.reduced)} reduced,"
            f" {step.seconds:.2f} s at an assumed {step.bytes_per_s / 1e9:.0f} GB/s{consequence}"
        )


def assumed_lengths(recipe: Recipe, name: str, shape: ModelShape) -> Lengths:
    """Without samples: every row of maximal length, half of its text targets, one image with the most tiles."""
    side = math.isqrt(shape.vision.num_patches) * shape.vision.patch_size
    fit, tokens = recipe.model.image, recipe.stage(name).data.max_length
    tiles, per_tile = fit.most_tiles(side), float(shape.features_per_tile)
    if fit.grid is not None:
        per_tile /= fit.grid.merge**2
        tiles = min(tiles, int(tokens / per_tile))
    targets = max(1, (tokens - int(tiles * per_tile)) // 2)
    return Lengths(Counts.of_sample(tokens, targets, tiles), tokens, "assumed: every sample of max_length")


def num_steps(stage: StageConfig, lengths: Lengths, num_samples: int | None) -> int | None:
    """Optimizer steps of a stage; None where they follow from data that are not here."""
    duration, rows = stage.duration, stage.batch.global_rows
    row = row_counts(stage, lengths, worst=False)
    samples = row.tokens / lengths.mean.tokens
    if duration.unit == "steps":
        return duration.count
    if duration.unit == "samples":
        return math.ceil(duration.count / (rows * samples))
    if duration.unit == "tokens":
        return math.ceil(duration.count / (rows * row.tokens))
    if num_samples is None:
        return None
    return math.ceil(num_samples * duration.count / (rows * samples))
