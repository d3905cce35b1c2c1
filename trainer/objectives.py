"""Objectives: from a batch to a sum of losses and the counts to divide by. Sums, never means.

B rows, L positions, K targets, D the language model's width, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batch import Batch
from models.vlm import VLM
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
        hidden_BLD = vlm(batch.input_ids_BL, batch.position_ids_BL, batch.tiles_TSSC)
        places_K = batch.real_N[batch.supervised_K]
        targets_K = batch.targets_BL.flatten()[places_K]
        logits_KV = vlm.head(hidden_BLD.flatten(0, 1)[places_K]).float()
        loss_K = F.cross_entropy(logits_KV, targets_K, reduction="none")
        num_correct = (logits_KV.detach().argmax(-1) == targets_K).sum()
        return LossSum(loss_K.sum(), num_correct, sums_by_row(loss_K, batch))


def sums_by_row(loss_K: Tensor, batch: Batch) -> Tensor:
    """The sums [B] of the losses of a batch's targets, row by row, detached."""
    sums_B = loss_K.new_zeros(batch.input_ids_BL.shape[0])
    return sums_B.index_add(0, batch.target_rows_K, loss_K.detach())


OBJECTIVES: dict[str, Callable[[Any], BatchLoss]] = {"next_token": NextTokenLoss}


def build_objective(config: Objective) -> BatchLoss:
    """The objective that `config` names."""
    return OBJECTIVES[config.kind](config)
