"""The best validation so far, and for how many it has not been beaten. A checkpoint carries it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Best:
    """The best value of the metric that checkpoints are compared by, and the step it was found at."""

    value: float | None = None
    step: int = 0
    num_worse: int = 0
    """Validations in a row that did not beat it."""
    last_step: int = -1
    """At which it was validated last."""

    def offer(self, value: float, step: int, *, lower_is_better: bool) -> bool:
        """Take note of a validation; whether it is the best so far. A value that is not finite never is."""
        self.last_step = step
        is_better = math.isfinite(value) and (
            self.value is None or (value < self.value if lower_is_better else value > self.value)
        )
        if is_better:
            self.value, self.step, self.num_worse = value, step, 0
        else:
            self.num_worse += 1
        return is_better

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
