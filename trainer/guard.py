"""What a step's numbers mean: take it, skip it, or go back to the last checkpoint.

Owns the statistics of past losses and the counters, which a checkpoint carries. Does not own the collectives: every
rank calls `judge` with the same global numbers and so comes to the same verdict.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from models.errors import InputError
from trainer.config import GuardConfig

STATE_VERSION = 1
MAD_TO_DEVIATION = 1.4826
"""Makes the median absolute deviation of a normal distribution its standard deviation."""


@dataclass(frozen=True)
class Verdict:
    """What to do with a step, and why if it is not taken."""

    action: Literal["step", "skip", "roll back"]
    reason: str = ""


class Guard:
    """Judges each step by its global loss and gradient norm."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike.window)
        self._skips_in_a_row = 0
        self.num_skipped_steps = 0
        self.num_rows_left_out = 0

    def judge(self, loss: float, norm: float, *, can_go_back: bool) -> Verdict:
        """The verdict on a step of mean loss `loss` and gradient norm `norm`; it is counted as it is given.

        Without a checkpoint to go back to a spike is skipped like a step that is not finite. Raises InputError where
        too many were skipped in a row.
        """
        reason = self._spike(loss)
        if reason is not None and can_go_back:
            return Verdict("roll back", reason)
        if reason is None and math.isfinite(loss) and math.isfinite(norm):
            self._losses.append(loss)
            self._skips_in_a_row = 0
            return Verdict("step")
        reason = reason or f"the {'gradient' if math.isfinite(loss) else 'loss'} is not finite"
        self.num_skipped_steps += 1
        self._skips_in_a_row += 1
        if self._skips_in_a_row < self._config.max_skips:
            return Verdict("skip", reason)
        reason = f"{self._skips_in_a_row} steps in a row could not be taken; the last: {reason}"
        if can_go_back:
            return Verdict("roll back", reason)
        raise InputError(f"{reason}; no checkpoint to go back to: lower the learning rate or look at the samples")

    def _spike(self, loss: float) -> str | None:
        """What makes `loss` a spike, or None. A loss that is not finite is no spike and never enters the statistics."""
        spike = self._config.spike
        if not math.isfinite(loss) or len(self._losses) < spike.window // 2:
            return None
        middle = median(self._losses)
        deviation = MAD_TO_DEVIATION * median(abs(value - middle) for value in self._losses)
        limit = middle + max(spike.rise, spike.deviations * deviation)
        if loss <= limit:
            return None
        return f"the loss leapt to {loss:.4f}; the last {len(self._losses)} have median {middle:.4f}, limit {limit:.4f}"

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "version": STATE_VERSION,
            "losses": list(self._losses),
            "skips_in_a_row": self._skips_in_a_row,
            "num_skipped_steps": self.num_skipped_steps,
            "num_rows_left_out": self.num_rows_left_out,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises InputError on an unknown version."""
        if state.get("version") != STATE_VERSION:
            raise InputError(f"a guard's state of version {state.get('version')}; this program reads {STATE_VERSION}")
        self._losses = deque(state["losses"], maxlen=self._config.spike.window)
        self._skips_in_a_row = state["skips_in_a_row"]
        self.num_skipped_steps = state["num_skipped_steps"]
        self.num_rows_left_out = state["num_rows_left_out"]
