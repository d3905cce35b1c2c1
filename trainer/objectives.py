"""Objectives: from a batch to a sum of losses and the counts to divide by. Sums, never means.

B rows, L positions, K targets, D the language model's width, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from models.attention import Segments
from models.decoder import Packed
from models.spec import IGNORE_INDEX
from models.vlm import VLM
from trainer.chunked_loss import head_losses
from trainer.config import MultiToken, NextToken, Objective
from trainer.image_text import ImageTextLoss
from trainer.loss_sum import BatchLoss, LossSum

__all__ = ["OBJECTIVES", "BatchLoss", "LossSum", "NextTokenLoss", "build_objective", "pack", "sums_by_row"]


class NextTokenLoss:
    """Cross-entropy of the next token at supervised positions; logits of the others are never computed."""

    def __init__(self, config: NextToken) -> None:
        del config

    def __call__(self, vlm: VLM, batch: Batch) -> LossSum:
        """Sums for one micro-batch. A batch without targets gives 0 that still hangs on every parameter."""
        hidden_KD = vlm.hidden_states(pack(batch), batch.tiles_TSSC, batch.picture_sizes)
        targets_K = batch.targets_BL.flatten()[batch.real_N[batch.supervised_K]]
        losses_K, num_correct = head_losses(vlm.language.get_output_embeddings(), hidden_KD, targets_K)
        return LossSum(losses_K.sum(), num_correct, sums_by_row(losses_K, batch))


class MultiTokenLoss:
    """Cross-entropy of the next token, and `weight` times that of each further one, by the heads of `model.future`.

    A head is taught at the positions whose next token is a target, where the token that it predicts is a target of
    the same sample: what stands behind a sample's end, or in a question, teaches nothing.
    """

    def __init__(self, config: MultiToken) -> None:
        self._weight = config.weight

    def __call__(self, vlm: VLM, batch: Batch) -> LossSum:
        """Sums for one micro-batch; right predictions are the next token's."""
        packed = pack(batch)
        hidden_ND, futures = vlm.future_states(packed, batch.tiles_TSSC, batch.picture_sizes)
        head, places_K = vlm.language.get_output_embeddings(), batch.supervised_K
        targets_K = batch.targets_BL.flatten()[batch.real_N[places_K]]
        losses_K, num_correct = head_losses(head, hidden_ND[places_K], targets_K)
        for distance, states_ND in enumerate(futures, start=1):
            further_K, _ = head_losses(head, states_ND[places_K], future_targets(batch, distance))
            losses_K = losses_K + self._weight * further_K
        return LossSum(losses_K.sum(), num_correct, sums_by_row(losses_K, batch))


def future_targets(batch: Batch, distance: int) -> Tensor:
    """For each of the K targets the one `distance` positions on, or `IGNORE_INDEX` where that is not of its sample.

    Within a sample positions count up by one; behind its end they begin again.
    """
    positions_N = batch.position_ids_BL.flatten()[batch.real_N]
    targets_N = batch.targets_BL.flatten()[batch.real_N]
    beyond_K = batch.supervised_K + distance
    places_K = beyond_K.clamp(max=len(positions_N) - 1)
    is_same_K = positions_N[places_K] == positions_N[batch.supervised_K] + distance
    return torch.where(is_same_K & (places_K == beyond_K), targets_N[places_K], IGNORE_INDEX)


def pack(batch: Batch) -> Packed:
    """A batch's samples one after another, without its padding; hidden states are wanted at its targets."""
    return Packed(
        input_ids_N=batch.input_ids_BL.flatten()[batch.real_N],
        position_ids_N=batch.position_ids_BL.flatten()[batch.real_N],
        image_I=batch.image_I,
        segments=Segments.of(batch.segment_starts_G1, batch.segment_lengths),
        wanted_K=batch.supervised_K,
    )


def sums_by_row(losses_K: Tensor, batch: Batch) -> Tensor:
    """The sums [B] of the losses of a batch's targets, row by row, detached."""
    sums_B = losses_K.new_zeros(batch.input_ids_BL.shape[0])
    return sums_B.index_add(0, batch.target_rows_K, losses_K.detach())


OBJECTIVES: dict[str, Callable[[Any], BatchLoss]] = {
    "next_token": NextTokenLoss,
    "multi_token": MultiTokenLoss,
    "image_text": ImageTextLoss,
}


def build_objective(config: Objective) -> BatchLoss:
    """The objective that `config` names."""
    return OBJECTIVES[config.kind](config)
