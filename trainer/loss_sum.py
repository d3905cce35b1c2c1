"""What an objective gives: sums, never means. B rows, N pairs, Q queries, E the width of comparison."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from data_pipeline.batch import Batch
from models.vlm import VLM


class Embeddings(NamedTuple):
    """Pictures and texts as unit vectors of one space, detached, where an objective compares them."""

    pictures_NQE: Tensor
    texts_NE: Tensor
    scale: Tensor
    """By which their similarities are multiplied, [1]."""


class LossSum(NamedTuple):
    """Sums over a batch's targets: the loss, and how many were predicted right. The batch knows their number."""

    loss_sum: Tensor
    num_correct: Tensor
    row_loss_sums_B: Tensor
    """The loss row by row, detached: a row that is not finite is named by it, and the step computed without it."""
    embeddings: Embeddings | None = None


class BatchLoss(Protocol):
    """An objective: what a stage minimises, as a sum over the targets of a batch."""

    def __call__(self, vlm: VLM, batch: Batch) -> LossSum:
        """The sums for one micro-batch; its gradient flows to whatever learns in `vlm`."""
        ...
