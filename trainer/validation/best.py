"""The best validation so far, and the number of validations since: one for each measure. A checkpoint carries them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Best:
    """The best value of the metric that checkpoints are compared by, and the step it was found at."""

    value: float | None = None
    step: int = 0
    num_worse: int = 0
    """Validations in a row that did not beat it."""
    last_step: int = -1
    """The step of the last validation."""
    measure: str = ""
    """The metric, a space, and a digest of what it is measured on; of an older version's best the metric alone."""
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The bests by measures that earlier starts of the stage had."""

    def offer(self, value: float, step: int, *, lower_is_better: bool) -> bool:
        """Record a validation; returns whether it is the best so far. A value that is not finite never is."""
        self.last_step = step
        is_better = math.isfinite(value) and (
            self.value is None or (value < self.value if lower_is_better else value > self.value)
        )
        if is_better:
            self.value, self.step, self.num_worse = value, step, 0
        else:
            self.num_worse += 1
        return is_better

    def measured_by(self, measure: str) -> Best:
        """The best by this measure, the one by the present measure kept beside it: values of two are not compared."""
        if self.measure in (measure, measure.partition(" ")[0]):
            self.measure = measure
            return self
        others = {name: dict(best) for name, best in self.others.items()}
        if self.value is not None:
            others[self.measure] = {name: value for name, value in asdict(self).items() if name != "others"}
        return Best(**{**others.pop(measure, {}), "measure": measure}, others=others)

    @property
    def steps(self) -> list[int]:
        """The steps of all bests, whatever they are measured by."""
        return [self.step, *(int(best["step"]) for best in self.others.values())]

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
