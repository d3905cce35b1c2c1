"""What a run's log says of its steps: sums since the last line, turned into rates and shares.

Owns the names of the metrics of training. Does not own where they go (`trainer.tracking`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from trainer.flops import Counts, peak_flops, utilisation
from trainer.global_step import GlobalBatch, StepResult
from trainer.schedule import Consumed
from trainer.stage import Stage
from trainer.tracking import Metrics


class Meter:
    """Sums over the steps since the last line; the same on every rank but for the waiting time."""

    def __init__(self, stage: Stage) -> None:
        self._groups, self._needs = stage.groups, stage.needs
        self._num_devices = stage.ranks.world_size
        self._peak = peak_flops(torch.cuda.get_device_name(stage.device)) if stage.device.type == "cuda" else None
        self._reset()

    def _reset(self) -> None:
        self._started_s = time.monotonic()
        self._loss = self._correct = self._targets = self._samples = self._positions = 0.0
        self._pictures = self._wait_s = 0.0
        self._counts = Counts(0, 0, 0, 0, 0)

    def add(self, batch: GlobalBatch, result: StepResult) -> None:
        """Count a global batch; one that was not learnt from counts for time and throughput alone."""
        sums = result.sums
        self._wait_s += batch.wait_s
        self._samples += sums.samples
        self._counts += sums.counts
        self._positions += sums.positions
        self._pictures += batch.pictures
        if result.verdict.action == "step":
            self._loss += sums.loss
            self._correct += sums.correct
            self._targets += sums.counts.targets

    def read(self, result: StepResult, rates: Sequence[float], consumed: Consumed) -> Metrics:
        """The line after a step, and a new beginning. `result` is the last step's, `rates` its learning rates."""
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        targets = max(self._targets, 1.0)
        metrics = {
            "loss": self._loss / targets,
            "token_accuracy": self._correct / targets,
            "learning_rate": max(rates),
            **{f"learning_rate/{group.part}": rate for group, rate in zip(self._groups, rates, strict=True)},
            "gradient_norm": result.norm,
            **{f"gradient_norm/{part}": norm for part, norm in self._norms(result).items()},
            "samples_per_s": self._samples / elapsed_s,
            "tokens_per_s": self._counts.tokens / elapsed_s,
            "pictures_per_s": self._pictures / elapsed_s,
            "padding_share": 1.0 - self._counts.tokens / max(self._positions, 1.0),
            "data_wait_share": self._wait_s / elapsed_s,
            "samples": float(consumed.samples),
            "tokens": float(consumed.tokens),
            **self._work(elapsed_s),
        }
        self._reset()
        return metrics

    def _work(self, elapsed_s: float) -> Metrics:
        """The FLOP/s that the steps needed, over all ranks, and their share of the devices' peak where it is known."""
        if self._needs is None:
            return {}
        needed = self._needs(self._counts)
        shares = utilisation(needed, elapsed_s, peak=self._peak, num_devices=self._num_devices)
        return {"needed_tflops_per_s": sum(part.total for part in needed.values()) / elapsed_s / 1e12, **shares}

    def _norms(self, result: StepResult) -> dict[str, float]:
        """The gradient's norm of each part, over its parameter groups."""
        squares: dict[str, float] = {}
        for group, square in zip(self._groups, result.sums.squared_norms, strict=True):
            squares[group.part] = squares.get(group.part, 0.0) + square
        return {part: math.sqrt(square) for part, square in squares.items()}
