"""Rows -> the tensors of one micro-batch.

Owns shifting, positions, segments and padding, and where everything stands: what a model would otherwise look for on
the device, in every layer, is counted here, once.

B rows, L tokens of the longest row, N tokens of all rows without padding, G segments (samples) of all rows, I image
tokens, K targets, T tiles of all rows in order, S the tile's side in pixels, C = 3 channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.sample import Row
from models.spec import IGNORE_INDEX, TextSpec

Ints = NDArray[np.int64]


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
    picture_sizes: tuple[tuple[int, int], ...]
    """(height, width) of each picture before it was fitted, on the host; under AnyRes they tell whose a tile is."""
    real_N: torch.Tensor
    """int64, where in the B x L positions the tokens are; never empty: a batch of padding alone keeps its first one."""
    segment_starts_G1: torch.Tensor
    """int32, where each segment begins among the N tokens, and N."""
    segment_lengths: tuple[int, ...]
    """The same on the host; their largest is what attention wants to know."""
    image_I: torch.Tensor
    """int64, where among the N tokens the image tokens are."""
    supervised_K: torch.Tensor
    """int64, where among the N tokens the targets are."""
    target_rows_K: torch.Tensor
    """int64, the row of each target."""
    tile_rows_T: torch.Tensor
    """int64, the row of each tile."""
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


TENSORS = tuple(field.name for field in fields(Batch) if field.type == "torch.Tensor")


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
        picture_sizes=tuple(size for row in rows for sample in row for size in sample.picture_sizes),
        tile_rows_T=_rows_of([sum(len(sample.tiles) for sample in row) for row in rows]),
        keys=tuple(tuple(sample.key for sample in row) for row in rows),
        shards=tuple(tuple(sample.shard for sample in row) for row in rows),
        num_targets=int(np.count_nonzero(targets != IGNORE_INDEX)),
        num_tokens=int(np.count_nonzero(segments)),
        num_samples=sum(len(row) for row in rows),
        **_layout(segments, positions, targets, (ids == text.image_token_id) & (segments != 0)),
    )


def _layout(segments: Ints, positions: Ints, targets: Ints, is_image: NDArray[np.bool_]) -> dict[str, Any]:
    """Where tokens, segments, image tokens and targets stand: the fields of a Batch that say so, of arrays [B, L]."""
    real = np.flatnonzero(segments)
    if not len(real):
        real = np.zeros(1, dtype=np.int64)
    lengths = np.diff(np.flatnonzero(positions.ravel()[real] == 0), append=len(real)).tolist()
    supervised = np.flatnonzero(targets != IGNORE_INDEX)
    return {
        "real_N": torch.from_numpy(real),
        "segment_starts_G1": _starts(lengths),
        "segment_lengths": tuple(lengths),
        "image_I": torch.from_numpy(np.flatnonzero(is_image.ravel()[real])),
        "supervised_K": torch.from_numpy(np.searchsorted(real, supervised)),
        "target_rows_K": torch.from_numpy(supervised // segments.shape[1]),
    }


def _starts(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _rows_of(counts: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.repeat(np.arange(len(counts)), counts))


def _tiles(rows: Sequence[Row]) -> torch.Tensor:
    """All tiles, [T, S, S, 3]; [0, 1, 1, 3] where no sample says how large a tile is."""
    found = [sample.tiles for row in rows for sample in row]
    if not found:
        return torch.zeros((0, 1, 1, 3), dtype=torch.uint8)
    return torch.from_numpy(np.concatenate(found))
