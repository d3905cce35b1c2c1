"""Rows gathered over ranks are the batch's rows, and their gradients those of one rank that holds them all."""

from __future__ import annotations

import pytest
import torch
import torch.distributed
from torch import Tensor

from tests.support.ranks import run_on_ranks
from trainer.distributed.context import DistributedContext
from trainer.objectives.gather import RowsByRank

SIZES = ((2, 3), (0, 4))


def rows_of(sizes: tuple[int, ...]) -> Tensor:
    return torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(sum(sizes)))


def compared(own: Tensor, everything: Tensor, start: int) -> Tensor:
    """A contrastive loss: every row against those of all ranks."""
    own_places = torch.arange(start, start + len(own))
    return torch.nn.functional.cross_entropy(own @ everything.T, own_places, reduction="sum")


def on_a_rank(ranks: DistributedContext) -> list[tuple[list[list[float]], list[list[float]], list[int]]]:
    torch.distributed.init_process_group("gloo")
    found = []
    for sizes in SIZES:
        start = sum(sizes[: ranks.rank])
        rows = rows_of(sizes)[start : start + sizes[ranks.rank]].requires_grad_()
        by_rank = RowsByRank.exchange_counts(len(rows), rows.device)
        assert by_rank.own == slice(start, start + len(rows))
        everything = by_rank.gather_features(rows)
        compared(rows, everything, start).backward()
        assert rows.grad is not None
        texts, mask = by_rank.gather_texts(
            torch.full((len(rows), 2 + ranks.rank), 7), torch.ones(len(rows), 2 + ranks.rank, dtype=torch.bool)
        )
        assert texts.shape == mask.shape == (sum(sizes), 3)
        counted = by_rank.all_reduce(torch.tensor([len(rows), 1])).tolist()
        found.append((everything.tolist(), rows.grad.tolist(), [*mask.sum(1).tolist(), *counted]))
    torch.distributed.destroy_process_group()
    return found


@pytest.mark.slow
def test_two_ranks_have_the_rows_and_gradients_of_one() -> None:
    first, second = run_on_ranks(2, on_a_rank)
    for sizes, (everything, left, counts), (same, right, _) in zip(SIZES, first, second, strict=True):
        rows = rows_of(sizes).requires_grad_()
        compared(rows, rows, 0).backward()
        assert rows.grad is not None
        assert everything == same == rows.tolist()
        torch.testing.assert_close(torch.tensor([*left, *right]), rows.grad)
        assert counts == [*[2] * sizes[0], *[3] * sizes[1], sum(sizes), 2]
