"""An objective's results: sums, never means. B rows, N pairs, Q queries, E the width of comparison."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from data_pipeline.batch import Batch
from models.vlm import VLM


class Embeddings(NamedTuple):
    """Images and texts as unit vectors of one space, detached, where an objective compares them."""

    images_NQE: Tensor
    texts_NE: Tensor
    scale: Tensor
    """The factor on their similarities, [1]."""


class LossSum(NamedTuple):
    """Sums over a batch's targets: the loss, and the number predicted right. The batch has the number of targets."""

    loss_sum: Tensor
    num_correct: Tensor
    row_loss_sums_B: Tensor
    """The loss of each row, detached: it shows which row is not finite, so that the step is computed without it."""
    embeddings: Embeddings | None = None


class BatchLoss(Protocol):
    """The loss of an objective, as a sum over the targets of a batch."""

    def __call__(self, vlm: VLM, batch: Batch) -> LossSum:
        """The sums for one micro-batch, with a gradient for the trained parameters of `vlm`."""
        ...
