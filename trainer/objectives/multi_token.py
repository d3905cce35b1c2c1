"""Multi-token prediction: the next token, and with the heads of `model.future` the tokens after it.

N tokens of all samples, K targets, D the language model's width.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from data_pipeline.batch import Batch
from models.config import ModelSource
from models.scaled_head import output_head
from models.shapes import ModelShape
from models.spec import IGNORE_INDEX
from models.vlm import VLM
from trainer.objectives.base import LanguageObjective
from trainer.objectives.chunked_loss import head_losses
from trainer.objectives.loss_sum import BatchLoss, LossSum
from trainer.objectives.next_token import pack, sums_by_row


class MultiToken(LanguageObjective):
    """Predict each supervised token, and with the heads of `model.future` the tokens after it.

    The loss is that of the next token and `weight` times the sum of the heads': 1 as in Gloeckle et al. 2024, 0.3 and
    0.1 as in DeepSeek-V3.
    """

    kind: Literal["multi_token"] = "multi_token"
    weight: float = Field(default=1.0, gt=0.0, le=1000.0)

    def build(self) -> BatchLoss:
        """See `ObjectiveConfig.build`."""
        return MultiTokenLoss(self.weight)

    def check_model(self, model: ModelSource) -> None:
        """Raise ValueError unless the model has heads."""
        if model.future is None:
            raise ValueError(
                "multi_token teaches the heads of model.future, and there are none; set it, say to {kind: parallel,"
                " num_tokens: 4}"
            )

    def counted(self, shape: ModelShape) -> ModelShape:
        """The shapes of all parts, including the heads."""
        return shape


class MultiTokenLoss:
    """Cross-entropy of the next token, and `weight` times that of each further one, by the heads of `model.future`.

    A head is trained at positions whose next token is a target and where the token that it predicts is a target of the
    same sample, so never on questions or beyond a sample's end.
    """

    def __init__(self, weight: float) -> None:
        self._weight = weight

    def __call__(self, vlm: VLM, batch: Batch) -> LossSum:
        """Sums for one micro-batch; right predictions are the next token's."""
        packed = pack(batch)
        hidden_ND, mtp_states = vlm.mtp_states(packed, batch.images)
        head, places_K = output_head(vlm.language), batch.layout.supervised_K
        targets_K = batch.layout.without_padding(batch.tokens.targets_BL)[places_K]
        losses_K, num_correct = head_losses(head, hidden_ND[places_K], targets_K)
        for distance, states_ND in enumerate(mtp_states, start=1):
            further_K, _ = head_losses(head, states_ND[places_K], mtp_targets(batch, distance))
            losses_K = losses_K + self._weight * further_K
        return LossSum(losses_K.sum(), num_correct, sums_by_row(losses_K, batch))


def mtp_targets(batch: Batch, distance: int) -> Tensor:
    """For each of the K targets the one `distance` positions on, or `IGNORE_INDEX` where that is not of its sample.

    Within a sample positions count up by one; after its end they start again.
    """
    positions_N = batch.layout.without_padding(batch.tokens.position_ids_BL)
    targets_N = batch.layout.without_padding(batch.tokens.targets_BL)
    beyond_K = batch.layout.supervised_K + distance
    places_K = beyond_K.clamp(max=len(positions_N) - 1)
    is_same_K = positions_N[places_K] == positions_N[batch.layout.supervised_K] + distance
    return torch.where(is_same_K & (places_K == beyond_K), targets_N[places_K], IGNORE_INDEX)
