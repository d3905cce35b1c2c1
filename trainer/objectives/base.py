"""Shared by objectives of the language model: the FLOPs and the memory of a step."""

from __future__ import annotations

from dataclasses import replace

from models.shapes import Counts, ModelShape, PartFlops
from trainer.config.objective import ObjectiveConfig
from trainer.config.tuning import TuningPlan
from trainer.flops.language import needed_flops
from trainer.flops.language_memory import FP32, language_activations
from trainer.objectives.chunked_loss import LOGITS_AT_ONCE


class LanguageObjective(ObjectiveConfig):
    """An objective of the language model's hidden states at targets; heads for further tokens are not run."""

    def counted(self, shape: ModelShape) -> ModelShape:
        """The shapes of the parts that a step runs."""
        return replace(shape, mtp=None)

    def flops(self, shape: ModelShape, plan: TuningPlan, counts: Counts) -> dict[str, PartFlops]:
        """FLOPs of vision encoder, projector and language model, and of the heads where `counted` has them."""
        return needed_flops(self.counted(shape), plan, counts)

    def activation_bytes(
        self, shape: ModelShape, plan: TuningPlan, counts: Counts, *, element: int, num_recomputed: int
    ) -> dict[str, float]:
        """Bytes of activations, and of one chunk's logits, their softmax and its gradient in fp32."""
        logits = min(counts.targets * shape.language.vocabulary, LOGITS_AT_ONCE)
        return {
            "activations": language_activations(self.counted(shape), plan, counts, element, num_recomputed),
            "logits": 3.0 * FP32 * logits,
        }
