"""The factor that keeps fp16 gradients inside fp16's range: halved where they overflow, doubled after a quiet time.

Powers of two only, so that scaling and scaling back change no gradient that is representable at all. An overflow loses
nothing: the same global batch is computed again at half the scale. Micikevicius et al. 2018; the constants are those
of torch's GradScaler. In bf16 and fp32 the factor is 1 and stays there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INITIAL = 2.0**16
LARGEST = 2.0**24
GROWTH_INTERVAL = 2000
"""Steps without an overflow before the scale is doubled."""


class LossScale:
    """The same on every rank: it goes by the global gradient norm alone."""

    def __init__(self, precision: str) -> None:
        self._is_dynamic = precision == "fp16"
        self.value = INITIAL if self._is_dynamic else 1.0
        self._num_quiet = 0

    def halve(self) -> bool:
        """After an overflow: True where it is worth to compute the step again, False where the scale is 1 already."""
        if self.value <= 1.0:
            return False
        self.value /= 2
        self._num_quiet = 0
        return True

    def count_step(self) -> None:
        """A step was taken."""
        self._num_quiet += 1
        if self._is_dynamic and self._num_quiet % GROWTH_INTERVAL == 0:
            self.value = min(2 * self.value, LARGEST)

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"value": self.value, "num_quiet": self._num_quiet}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A run that went over to another precision starts with that one's own scale."""
        if self._is_dynamic and state["value"] > 1.0:
            self.value, self._num_quiet = float(state["value"]), int(state["num_quiet"])
