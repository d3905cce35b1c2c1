"""Objectives: from a batch to a sum of losses and the counts to divide by. Sums, never means.

B rows, L positions, K targets, D the language model's width, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from data_pipeline.batch import Batch
from models.attention import Segments
from models.decoder import Packed
from models.vlm import VLM
from trainer.chunked_loss import head_losses
from trainer.config import NextToken, Objective


class LossSum(NamedTuple):
    """Sums over a batch's targets: the loss, and how many were predicted right. The batch knows their number."""

    loss_sum: Tensor
    num_correct: Tensor
    row_loss_sums_B: Tensor
    """The loss row by row, detached: a row that is not finite is named by it, and left out by `Batch.keep_rows`."""


class BatchLoss(Protocol):
    """An objective: what a stage minimises, as a sum over the targets of a batch."""

    def __call__(self, vlm: VLM, batch: Batch) -> LossSum:
        """The sums for one micro-batch; its gradient flows to whatever learns in `vlm`."""
        ...


class NextTokenLoss:
    """Cross-entropy of the next token at supervised positions; logits of the others are never computed."""

    def __init__(self, config: NextToken) -> None:
        del config

    def __call__(self, vlm: VLM, batch: Batch) -> LossSum:
        """Sums for one micro-batch. A batch without targets gives 0 that still hangs on every parameter."""
        hidden_KD = vlm.hidden_states(pack(batch), batch.tiles_TSSC)
        targets_K = batch.targets_BL.flatten()[batch.real_N[batch.supervised_K]]
        losses_K, num_correct = head_losses(vlm.language.get_output_embeddings(), hidden_KD, targets_K)
        return LossSum(losses_K.sum(), num_correct, sums_by_row(losses_K, batch))


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


OBJECTIVES: dict[str, Callable[[Any], BatchLoss]] = {"next_token": NextTokenLoss}


def build_objective(config: Objective) -> BatchLoss:
    """The objective that `config` names."""
    return OBJECTIVES[config.kind](config)
