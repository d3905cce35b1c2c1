"""What a stage trained in one part of the model, merged into the part's own tensors one at a time.

    base tensor --replaced, or + alpha / rank * B A in fp32--> trained tensor

The same for every part. Does not own where a tensor comes from or goes to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.common.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from tools.export.reference import Trained

PREFIXES = {"vision": "vision.model.", "projector": "projector.", "language": "language.", "future": "future."}
"""A part, and what its tensors' names in a checkpoint begin with."""


class PartMerge:
    """One part's trained weights, of which each must find its place."""

    def __init__(self, trained: Trained, part: str) -> None:
        self._trained, self._prefix = trained, PREFIXES[part]
        self._scaling = lora_scaling(trained.config, part)
        self._waiting = {name for name in trained.names if name.startswith(self._prefix)}
        self._known = frozenset(self._waiting)

    def changes(self, name: str) -> bool:
        """Whether something was trained in a tensor, by its name in the part."""
        names = (*self._wholes(name), self._adapter(name, "lora_A.default.weight"), self._embedding(name, "A"))
        return any(each in self._known for each in names)

    def merged(self, name: str, value: Tensor) -> Tensor:
        """The trained tensor, for the base's `value`; in fp32 where anything was trained in it."""
        for whole in self._wholes(name):
            if whole in self._known:
                self._waiting.discard(whole)
                value = self._trained.weight(whole)
        value = self._with_adapter(name, value)
        first, second = (self._embedding(name, side) for side in "AB")
        if first in self._known:  # rows are looked up, so the product stands the other way round
            weight = self._trained.weight
            value = value.float().addmm_(weight(first).T, weight(second).T, alpha=self._scaling)
            self._waiting -= {first, second}
        return value

    def _with_adapter(self, name: str, value: Tensor) -> Tensor:
        down, up = (self._adapter(name, f"lora_{side}.default.weight") for side in "AB")
        if down not in self._known:
            return value
        magnitude, weight = self._adapter(name, "lora_magnitude_vector.default.weight"), self._trained.weight
        value = value.float().addmm_(weight(up), weight(down), alpha=self._scaling)
        if magnitude in self._known:  # DoRA: the rows of the sum give directions, the magnitudes their lengths
            value *= (weight(magnitude) / value.norm(dim=1)).unsqueeze(1)
        self._waiting -= {down, up, magnitude}
        return value

    def check_complete(self, where: str) -> None:
        """Raise InputError where a trained weight found no place, so that nothing is lost silently."""
        if self._waiting:
            raise InputError(f"{where}: no place for {min(self._waiting)}, which was trained; is it another base?")

    def _wholes(self, name: str) -> tuple[str, str]:
        """A whole tensor's names in a checkpoint: as it is, and under an adapter."""
        from trainer.checkpoint.initial_weights import adapted_name

        return f"{self._prefix}{name}", adapted_name(f"{self._prefix}{name}")

    def _adapter(self, name: str, leaf: str) -> str:
        if not name.endswith(".weight"):
            return ""
        return f"{self._prefix}{name.removesuffix('.weight')}.{leaf}"

    def _embedding(self, name: str, side: str) -> str:
        return f"{self._prefix}{name.removesuffix('.weight')}.lora_embedding_{side}.default"


def lora_scaling(config: Any, part: str) -> float:
    """alpha / rank of a stage's adapters in a part, or 0 where there are none."""
    from trainer.config.tuning import Lora

    tuning = getattr(config.tune, part)
    return tuning.alpha / tuning.rank if isinstance(tuning, Lora) else 0.0
