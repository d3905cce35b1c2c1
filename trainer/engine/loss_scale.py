"""Dynamic loss scaling keeps fp16 gradients within fp16's range (Micikevicius et al. 2018, section 3.2).

The scale is halved where a gradient overflows and doubled after an interval without overflow. Powers of two only, so
scaling and scaling back changes no gradient that fp16 can represent. An overflow loses no data: the same global batch
is computed again at half the scale. In bf16 and fp32 the scale is 1 and stays 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INITIAL = 2.0**16  # this and the interval are the defaults of torch.amp.GradScaler
LARGEST = 2.0**24
GROWTH_INTERVAL = 2000
"""Steps without an overflow before the scale is doubled."""


class LossScale:
    """One stage's loss scale. It depends only on the global gradient norm, so it is the same on every rank."""

    def __init__(self, precision: str) -> None:
        self._is_dynamic = precision == "fp16"
        self.value = INITIAL if self._is_dynamic else 1.0
        self._num_quiet = 0

    def halve(self) -> bool:
        """Halve the scale after an overflow.

        Returns:
            Whether to compute the step again: False where the scale is already 1, so the values themselves are too
        large.
        """
        if self.value <= 1.0:
            return False
        self.value /= 2
        self._num_quiet = 0
        return True

    def count_step(self) -> None:
        """Count a step that was taken, and double the scale when enough of them were."""
        self._num_quiet += 1
        if self._is_dynamic and self._num_quiet % GROWTH_INTERVAL == 0:
            self.value = min(2 * self.value, LARGEST)

    def state_dict(self) -> dict[str, Any]:
        """The value of `loss_scale` in a checkpoint."""
        return {"value": self.value, "num_quiet": self._num_quiet}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it; a run that changed its precision to or from fp16 keeps the new precision's initial scale."""
        if self._is_dynamic and state["value"] > 1.0:
            self.value, self._num_quiet = float(state["value"]), int(state["num_quiet"])
