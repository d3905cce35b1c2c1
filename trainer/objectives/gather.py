"""All-gather of rows with gradients, for objectives that compare rows.

    rank 0: [3, E] --+                      +--> [5, E] on every rank, in rank order
    rank 1: [2, E] --+-- all-gather --------+
    backward: the gradients that all ranks have for a row are added up and go back to the rank that owns it

A rank owns a contiguous run of the global batch's rows, so the gathered rows are in the batch's order, on any number of
ranks. Every rank must gather equally often, in the forward and in the backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from models.common.errors import InputError
from trainer.config.schema import StageConfig


def check_rows_at_once(config: StageConfig, world_size: int, where: str) -> None:
    """Raise InputError where the stage compares the rows of a batch and a rank would need several micro-batches."""
    rows = config.batch.rank_rows(world_size)
    if config.objective.compares_rows and rows > config.batch.micro_rows:
        raise InputError(
            f"{where}.batch.micro_rows: {config.batch.micro_rows}, but {config.objective.kind} compares all rows of a"
            f" batch with each other, so a rank must take its {rows} at once: raise it to {rows}, lower global_rows, or"
            " take more GPUs"
        )


@dataclass(frozen=True)
class RowsByRank:
    """How many rows each rank has, and which rank this is."""

    sizes: tuple[int, ...]
    rank: int

    @classmethod
    def exchange_counts(cls, num_rows: int, device: torch.device) -> RowsByRank:
        """All-gather the numbers of rows. Waits for all ranks, and for the device."""
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return cls((num_rows,), 0)
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(sizes, torch.tensor([num_rows], device=device))
        return cls(tuple(int(size) for size in torch.cat(sizes).tolist()), torch.distributed.get_rank())

    @property
    def own(self) -> slice:
        """The slice of this rank's rows in the gathered ones."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    def gather_features(self, rows: Tensor) -> Tensor:
        """All-gather with gradient: `rows` [N, ...] -> the rows [M, ...] of all ranks; other sizes must agree."""
        if len(self.sizes) == 1:
            return rows
        longest = max(self.sizes)
        padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])]).contiguous()
        everything = _Gather.apply(padded)
        return torch.cat([part[:size] for part, size in zip(everything, self.sizes, strict=True)])

    def gather_texts(self, ids_NL: Tensor, is_text_NL: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask of all ranks' texts, padded to the longest of all."""
        if len(self.sizes) == 1:
            return ids_NL, is_text_NL
        length = torch.tensor([ids_NL.shape[1]], device=ids_NL.device)
        torch.distributed.all_reduce(length, op=torch.distributed.ReduceOp.MAX)
        missing = (0, int(length) - ids_NL.shape[1])
        # as int64: gloo and NCCL treat booleans differently
        is_text_ML = self.gather_features(F.pad(is_text_NL.long(), missing)).bool()
        return self.gather_features(F.pad(ids_NL, missing)), is_text_ML

    def all_reduce(self, counts: Tensor) -> Tensor:
        """The element-wise sum of integers over the ranks."""
        if len(self.sizes) > 1:
            counts = counts.clone()
            torch.distributed.all_reduce(counts)
        return counts


class _Gather(Function):
    """all_gather of equal shapes; its backward sums over the ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = torch.stack(gradients).contiguous()
        torch.distributed.all_reduce(total)
        return total[torch.distributed.get_rank()]
