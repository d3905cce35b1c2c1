"""Objectives: from a batch to a sum of losses and the counts to divide by. Sums, never means.

B rows, L positions, K supervised positions, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batch import Batch
from models.spec import IGNORE_INDEX
from models.vlm import VLM
from trainer.config import NextToken, Objective


class LossSum(NamedTuple):
    """Sums over a batch's targets: the loss, and how many were predicted right. The batch knows their number."""

    loss_sum: Tensor
    num_correct: Tensor


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
        supervised_BL = batch.targets_BL != IGNORE_INDEX
        targets_K = batch.targets_BL[supervised_BL]
        logits_KV = vlm.head(hidden_BLD[supervised_BL]).float()
        loss_sum = F.cross_entropy(logits_KV, targets_K, reduction="sum") + 0.0 * hidden_BLD.sum()
        return LossSum(loss_sum, (logits_KV.detach().argmax(-1) == targets_K).sum())


OBJECTIVES: dict[str, Callable[[Any], BatchLoss]] = {"next_token": NextTokenLoss}


def build_objective(config: Objective) -> BatchLoss:
    """The objective that `config` names."""
    return OBJECTIVES[config.kind](config)
