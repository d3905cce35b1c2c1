"""Training metrics: sums since the last logged line, converted to rates and shares.

Owns the names of the metrics of training. Does not own the files and loggers (`trainer.tracking.tracker`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from models.shapes import Counts
from trainer.flops.estimator import FlopsEstimator
from trainer.flops.utilisation import utilisation
from trainer.tracking.loggers import Metrics


class ThroughputMeter:
    """Sums over the batches since the last line; the same on every rank but for the waiting time.

    Args:
        parts: the part of the model of each parameter group.
        estimator: needed FLOPs of counts; None where they are not known; then not reported.
        peak: dense FLOP/s of one device; None where it is not known; then shares of it are not reported.
    """

    def __init__(
        self, parts: Sequence[str], estimator: FlopsEstimator | None, *, num_devices: int, peak: float | None
    ) -> None:
        self._parts, self._estimator = parts, estimator
        self._num_devices, self._peak = num_devices, peak
        self.reset()

    def reset(self) -> None:
        """Restart counting and timing."""
        self._started_s = time.monotonic()
        self._loss_sum = self._num_correct = self._num_targets = 0.0
        self._num_samples = self._num_positions = self._num_images = self._wait_s = 0.0
        self._counts = Counts(0, 0, 0, 0, 0)

    def leave_out(self, seconds: float) -> None:
        """Let the time that something else has just taken count for no rate."""
        self._started_s += seconds

    def add(self, counts: Counts, num_samples: float, num_positions: float, num_images: float, wait_s: float) -> None:
        """Count a global batch, used or skipped; `wait_s` is how long this rank waited for its rows."""
        self._counts += counts
        self._num_samples += num_samples
        self._num_positions += num_positions
        self._num_images += num_images
        self._wait_s += wait_s

    def add_learnt(self, loss_sum: float, num_correct: float, num_targets: float) -> None:
        """Count the losses of a global batch that became a step."""
        self._loss_sum += loss_sum
        self._num_correct += num_correct
        self._num_targets += num_targets

    def read(self, *, norm: float, squared_norms: Sequence[float], learning_rates: Sequence[float]) -> Metrics:
        """The metrics since the last call; restarts counting.

        Args:
            norm: the last step's gradient norm.
            squared_norms: its square for each parameter group.
            learning_rates: the last step's, for each parameter group.
        """
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        num_targets = max(self._num_targets, 1.0)
        metrics = {
            "loss": self._loss_sum / num_targets,
            "token_accuracy": self._num_correct / num_targets,
            "learning_rate": max(learning_rates),
            **{f"learning_rate/{part}": rate for part, rate in zip(self._parts, learning_rates, strict=True)},
            "gradient_norm": norm,
            **{f"gradient_norm/{part}": value for part, value in self._norms(squared_norms).items()},
            "samples_per_s": self._num_samples / elapsed_s,
            "tokens_per_s": self._counts.tokens / elapsed_s,
            "pictures_per_s": self._num_images / elapsed_s,
            "padding_share": 1.0 - self._counts.tokens / max(self._num_positions, 1.0),
            "data_wait_share": self._wait_s / elapsed_s,
            **self._work(elapsed_s),
        }
        self.reset()
        return metrics

    def _work(self, elapsed_s: float) -> Metrics:
        """The FLOP/s that the steps needed, over all ranks, and their share of the devices' peak where it is known."""
        if self._estimator is None:
            return {}
        needed = self._estimator(self._counts)
        shares = utilisation(needed, elapsed_s, peak=self._peak, num_devices=self._num_devices)
        return {"needed_tflops_per_s": sum(part.total for part in needed.values()) / elapsed_s / 1e12, **shares}

    def _norms(self, squared_norms: Sequence[float]) -> dict[str, float]:
        """The gradient's norm of each part of the model, over its parameter groups."""
        squares: dict[str, float] = {}
        for part, square in zip(self._parts, squared_norms, strict=True):
            squares[part] = squares.get(part, 0.0) + square
        return {part: math.sqrt(square) for part, square in squares.items()}
