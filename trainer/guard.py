"""Decides from a step's loss and gradient norm: take it, skip it, or go back to the last checkpoint.

Owns the statistics of past losses and the counters, which a checkpoint carries. Does not own the collectives: every
rank calls `decide` with the same global numbers and so comes to the same decision.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from models.common.errors import InputError
from trainer.config.schema import GuardConfig

STATE_VERSION = 1
MAD_TO_DEVIATION = 1.4826
"""Makes the median absolute deviation of a normal distribution its standard deviation."""


@dataclass(frozen=True)
class StepDecision:
    """The decision on a step, with the reason if it is not taken."""

    action: Literal["step", "skip", "roll back"]
    reason: str = ""


class Guard:
    """Decides on each step by its global loss and gradient norm."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike.window)
        self._skips_in_a_row = 0
        self.num_skipped_steps = 0
        self.num_rows_left_out = 0

    def decide(self, loss: float, norm: float, *, can_go_back: bool) -> StepDecision:
        """The decision on a step; it is counted as it is given.

        Args:
            loss: the mean over the targets of the global batch, in nats.
            norm: the gradient's, before clipping.
            can_go_back: whether there is a checkpoint to roll back to; a spike is skipped where there is none.

        Raises:
            InputError: too many steps in a row were skipped, and there is no checkpoint to go back to.
        """
        reason = self._spike(loss)
        if reason is not None and can_go_back:
            return StepDecision("roll back", reason)
        if reason is None and math.isfinite(loss) and math.isfinite(norm):
            self._losses.append(loss)
            self._skips_in_a_row = 0
            return StepDecision("step")
        reason = reason or f"the {'gradient' if math.isfinite(loss) else 'loss'} is not finite"
        self.num_skipped_steps += 1
        self._skips_in_a_row += 1
        if self._skips_in_a_row < self._config.max_skips:
            return StepDecision("skip", reason)
        reason = f"{self._skips_in_a_row} steps in a row could not be taken; the last: {reason}"
        if can_go_back:
            return StepDecision("roll back", reason)
        raise InputError(f"{reason}; no checkpoint to go back to: lower the learning rate or look at the samples")

    def _spike(self, loss: float) -> str | None:
        """The reason why `loss` is a spike, or None. A non-finite loss is no spike and never enters the statistics."""
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
