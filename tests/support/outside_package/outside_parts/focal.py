"""Focal loss of the next token (Lin et al. 2017): what is predicted well already weighs less. K targets."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from data_pipeline.batch import Batch
from models.vlm import VLM
from trainer.objectives.base import LanguageObjective
from trainer.objectives.chunked_loss import head_losses
from trainer.objectives.loss_sum import BatchLoss, LossSum
from trainer.objectives.next_token import pack, sums_by_row


class Focal(LanguageObjective):
    """The loss of a target of probability p is multiplied by (1 - p) ** gamma."""

    kind: Literal["focal"] = "focal"
    gamma: PositiveFloat = 2.0

    def build(self) -> BatchLoss:
        """See `ObjectiveConfig.build`."""
        return FocalLoss(self.gamma)


class FocalLoss:
    """Sums over the targets of a batch."""

    def __init__(self, gamma: float) -> None:
        self._gamma = gamma

    def __call__(self, vlm: VLM, batch: Batch) -> LossSum:
        """See `BatchLoss`."""
        hidden_KD = vlm.hidden_states(pack(batch), batch.images)
        targets_K = batch.layout.without_padding(batch.tokens.targets_BL)[batch.layout.supervised_K]
        losses_K, num_correct = head_losses(vlm.language.get_output_embeddings(), hidden_KD, targets_K)
        losses_K = losses_K * (1 - (-losses_K.detach()).exp()) ** self._gamma
        return LossSum(losses_K.sum(), num_correct, sums_by_row(losses_K, batch))
