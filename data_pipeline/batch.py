"""Rows -> the tensors of one micro-batch.

Owns shifting, positions, segments and padding. Legend: B rows, L tokens of the longest row, T tiles of all rows in
order, S the tile's side in pixels, C = 3 channels, P pictures of all rows in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from data_pipeline.sample import Row
from models.spec import IGNORE_INDEX, TextSpec


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Pictures are uint8: they are scaled and normalised on the device."""

    input_ids_BL: torch.Tensor
    """int64; padding is the pad token."""
    targets_BL: torch.Tensor
    """int64, shifted: the id to be predicted at this position, `IGNORE_INDEX` where none is; never across samples."""
    position_ids_BL: torch.Tensor
    """int64, from 0 in every sample; 0 in padding."""
    segment_ids_BL: torch.Tensor
    """int64: 0 is padding, 1, 2, … the samples of a row, which never see each other."""
    tiles_TSSC: torch.Tensor
    """uint8, in the order of their image tokens."""
    picture_sizes_P2: torch.Tensor
    """int64, (height, width) of each picture before it was fitted; under AnyRes they say which tiles are whose."""
    keys: tuple[tuple[str, ...], ...]
    """Per row, per sample."""
    shards: tuple[tuple[str, ...], ...]
    num_targets: int
    num_tokens: int
    """Without padding."""
    num_samples: int

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in TENSORS})

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU run beside the computation."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in TENSORS})


TENSORS = ("input_ids_BL", "targets_BL", "position_ids_BL", "segment_ids_BL", "tiles_TSSC", "picture_sizes_P2")


def collate(rows: Sequence[Row], text: TextSpec) -> Batch:
    """Pad rows to the longest. Rows of slots that ran out are padding alone; at least one position is kept."""
    length = max([1, *(sum(sample.num_tokens for sample in row) for row in rows)])
    shape = (len(rows), length)
    ids = np.full(shape, text.pad_token_id, dtype=np.int64)
    targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    positions, segments = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for place, row in enumerate(rows):
        start = 0
        for number, sample in enumerate(row, start=1):
            end = start + sample.num_tokens
            ids[place, start:end] = sample.input_ids
            targets[place, start : end - 1] = sample.labels[1:]
            positions[place, start:end] = np.arange(sample.num_tokens)
            segments[place, start:end] = number
            start = end
    return Batch(
        input_ids_BL=torch.from_numpy(ids),
        targets_BL=torch.from_numpy(targets),
        position_ids_BL=torch.from_numpy(positions),
        segment_ids_BL=torch.from_numpy(segments),
        tiles_TSSC=_tiles(rows),
        picture_sizes_P2=_picture_sizes(rows),
        keys=tuple(tuple(sample.key for sample in row) for row in rows),
        shards=tuple(tuple(sample.shard for sample in row) for row in rows),
        num_targets=int(np.count_nonzero(targets != IGNORE_INDEX)),
        num_tokens=int(np.count_nonzero(segments)),
        num_samples=sum(len(row) for row in rows),
    )


def _tiles(rows: Sequence[Row]) -> torch.Tensor:
    """All tiles, [T, S, S, 3]; [0, 1, 1, 3] where no sample says how large a tile is."""
    found = [sample.tiles for row in rows for sample in row]
    if not found:
        return torch.zeros((0, 1, 1, 3), dtype=torch.uint8)
    return torch.from_numpy(np.concatenate(found))


def _picture_sizes(rows: Sequence[Row]) -> torch.Tensor:
    sizes = [size for row in rows for sample in row for size in sample.picture_sizes]
    return torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)
