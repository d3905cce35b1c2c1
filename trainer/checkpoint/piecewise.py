"""Reads pieces of a checkpoint's files straight into the tensors that they belong to, each file once, front to back.

    file:  | slice of A | slice of B | slice of C |      one call reads neighbouring pieces into A, B and C
                 v            v            v

A tensor of the stored dtype on the host is read into without a copy; any other is filled from a buffer of at most
`MAX_CALL_BYTES`, or of one piece. The time follows from the bytes: a piece costs well under a microsecond.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.common.byte_ranges import bytes_of
from models.common.errors import InputError
from models.common.sharded import DTYPES
from trainer.checkpoint.layout import ITEMSIZES, IntArray, Pieces

MAX_CALL_BYTES = 1 << 27
MAX_CALL_PIECES = 1000
"""Linux takes 1,024 buffers in one call (IOV_MAX)."""

_DTYPES = list(DTYPES.values())


class _Staged(NamedTuple):
    """A piece that is copied after it was read."""

    wanted: int
    at: int
    values: Tensor


def read_pieces(files: Sequence[Path], pieces: Pieces, targets: Sequence[Tensor]) -> None:
    """Fill each target, flat and contiguous, with the pieces that are its own.

    Raises:
        InputError: a file ends too early.
        OSError: a file cannot be read.
    """
    if not len(pieces.file):
        return
    views = _views(pieces, targets)
    sizes = pieces.numel * ITEMSIZES[pieces.dtype]
    bounds = _calls(pieces, sizes)
    current, descriptor = -1, -1
    try:
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            number = int(pieces.file[begin])
            if number != current:
                if descriptor >= 0:
                    os.close(descriptor)
                    descriptor = -1
                descriptor, current = os.open(files[number], os.O_RDONLY), number
            call = Pieces(*(column[begin:end] for column in pieces))
            buffers, staged = _buffers(call, sizes[begin:end], views)
            _fill(descriptor, buffers, int(call.offset[0]), int(sizes[begin:end].sum()), files[number])
            for each in staged:
                targets[each.wanted][each.at : each.at + len(each.values)].copy_(each.values)
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _views(pieces: Pieces, targets: Sequence[Tensor]) -> list[memoryview | None]:
    """The memory of each target; None where it cannot be read into, by its device or by the dtype of a piece."""
    codes = np.array([_DTYPES.index(target.dtype) for target in targets], dtype=np.int64)
    converted = set(np.unique(pieces.wanted[codes[pieces.wanted] != pieces.dtype]).tolist())
    return [
        None if place in converted or target.device.type != "cpu" else bytes_of(target)
        for place, target in enumerate(targets)
    ]


def _calls(pieces: Pieces, sizes: IntArray) -> IntArray:
    """The pieces at which a call begins, and their number."""
    neighbours = (pieces.file[1:] == pieces.file[:-1]) & (pieces.offset[1:] == pieces.offset[:-1] + sizes[:-1])
    for measure, limit in ((np.arange(len(sizes)), MAX_CALL_PIECES), (np.cumsum(sizes), MAX_CALL_BYTES)):
        neighbours &= measure[1:] // limit == measure[:-1] // limit
    return np.concatenate([[0], np.flatnonzero(~neighbours) + 1, [len(sizes)]])


def _buffers(
    call: Pieces, sizes: IntArray, views: Sequence[memoryview | None]
) -> tuple[list[memoryview], list[_Staged]]:
    """The memory that a call fills, piece by piece, and what is to be copied from it afterwards."""
    begins = call.at * ITEMSIZES[call.dtype]
    spans = zip(call.wanted.tolist(), begins.tolist(), (begins + sizes).tolist(), strict=True)
    if None not in views:  # the time of half a million pieces
        return [views[wanted][begin:end] for wanted, begin, end in spans], []
    buffers: list[memoryview] = []
    staged: list[_Staged] = []
    for place, (wanted, begin, end) in enumerate(spans):
        view = views[wanted]
        if view is None:
            values = torch.empty(int(call.numel[place]), dtype=_DTYPES[int(call.dtype[place])])
            staged.append(_Staged(wanted, int(call.at[place]), values))
            buffers.append(bytes_of(values))
        else:
            buffers.append(view[begin:end])
    return buffers, staged


def _fill(descriptor: int, buffers: list[memoryview], offset: int, num_bytes: int, file: Path) -> None:
    """Read `num_bytes` into the buffers; one call may give only a part, at most 2 GiB."""
    done = 0
    while done < num_bytes:
        num_read = os.preadv(descriptor, buffers, offset + done)
        if not num_read:
            raise InputError(f"{file}: cut short while it was read; use another checkpoint")
        done += num_read
        if done < num_bytes:
            buffers = _behind(buffers, num_read)


def _behind(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of the buffers once their first bytes are filled."""
    for place, buffer in enumerate(buffers):
        if num_bytes < len(buffer):
            return [buffer[num_bytes:], *buffers[place + 1 :]]
        num_bytes -= len(buffer)
    return []
