"""The ledger's form on disk: blocks of lines as compressed columns, appended and never rewritten.

    block:  head | batches | runs | order | values
            head      a mark, how many lines, how long each part is, a checksum
            batches   batch, step, number of draws and of draws left out, for each line
            runs      slot, first n, length: draws that follow each other in a slot, whatever lines they are in
            order     the slot of each draw, in the order of the lines
            values    further values of the lines, as JSON (the loss, on the first rank)

A slot mostly takes one draw after the other, so a block of a thousand lines has about as many runs as the rank has
slots. The audit reads batches and runs alone. A block that was broken off in writing ends its file.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from models.common.documents import parse

IntArray = NDArray[np.int64]
ENDING = ".blocks"
_HEAD = struct.Struct("<4s6I")
_MARK = b"SLB1"
_COLUMN = struct.Struct("<BIq")
_WIDTHS = [np.dtype(f"<i{width}") for width in (1, 2, 4, 8)]
_MAX_PART_BYTES = 1 << 28
"""Longest part of a block; a longer one is damage."""
NO_STEP = -1


@dataclass(frozen=True)
class Runs:
    """Draws [first, first + length) of a slot; by slot, and within a slot in the order in which they were taken."""

    slot: IntArray
    first: IntArray
    length: IntArray


class Block:
    """Lines of one rank. What is asked for first is decoded first."""

    def __init__(self, num_lines: int, parts: Sequence[bytes]) -> None:
        self.num_lines = num_lines
        self._parts = parts

    @cached_property
    def _batches(self) -> list[IntArray]:
        return _unpack(zlib.decompress(self._parts[0]))

    @property
    def batch(self) -> IntArray:
        """[lines]"""
        return self._batches[0]

    @property
    def step(self) -> IntArray:
        """[lines]; `NO_STEP` where the batch was skipped."""
        return self._batches[1]

    @property
    def num_draws(self) -> IntArray:
        """[lines]: draws that were trained on."""
        return self._batches[2]

    @property
    def num_left_out(self) -> IntArray:
        """[lines]"""
        return self._batches[3]

    @cached_property
    def runs(self) -> Runs:
        """Every draw of the block, in runs."""
        slot, first, length = _unpack(zlib.decompress(self._parts[1]))
        return Runs(slot, first, length)

    @cached_property
    def draws(self) -> tuple[IntArray, IntArray]:
        """Slot and n of each draw: line by line, in a line those that were trained on first."""
        (slot,) = _unpack(zlib.decompress(self._parts[2]))
        runs = self.runs
        ends = np.cumsum(runs.length)
        within = np.arange(len(slot)) - np.repeat(ends - runs.length, runs.length)
        n = np.empty(len(slot), dtype=np.int64)
        n[_by_slot(slot)] = np.repeat(runs.first, runs.length) + within
        return slot, n

    def lines(self) -> Iterator[dict[str, Any]]:
        """The lines as JSON values, as they stood in a file of lines."""
        pairs = np.stack(self.draws, axis=1).tolist()
        values = parse(zlib.decompress(self._parts[3]), "a block of the ledger") if self._parts[3] else None
        place = 0
        columns = (self.batch, self.step, self.num_draws, self.num_left_out)
        for number, (batch, step, kept, left) in enumerate(zip(*(each.tolist() for each in columns), strict=True)):
            yield {
                "batch": batch,
                "step": None if step == NO_STEP else step,
                "draws": pairs[place : place + kept],
                "left_out": pairs[place + kept : place + kept + left],
                **(values[number] if values else {}),
            }
            place += kept + left

    def to_bytes(self) -> bytes:
        """The block as it is appended to a file."""
        body = b"".join(self._parts)
        head = _HEAD.pack(_MARK, self.num_lines, *(len(part) for part in self._parts), zlib.crc32(body))
        return head + body


def make_block(batches: Sequence[IntArray], slot: IntArray, n: IntArray, values: Sequence[Mapping[str, Any]]) -> Block:
    """A block of lines.

    Args:
        batches: batch, step, number of draws and of draws left out, each [lines].
        slot: of each draw, in the order of `Block.draws`.
        n: likewise.
        values: further values of each line; those of a line may be empty.
    """
    order = _by_slot(slot)
    sorted_slot, sorted_n = slot[order], n[order]
    begins = np.flatnonzero(
        np.concatenate([[True], (np.diff(sorted_slot) != 0) | (np.diff(sorted_n) != 1)])[: len(slot)]
    )
    length = np.diff(np.concatenate([begins, [len(slot)]]))
    runs = [sorted_slot[begins], sorted_n[begins], length]
    parts = [zlib.compress(_pack(columns), 6) for columns in (batches, runs, [slot])]
    told = zlib.compress(json.dumps(list(values)).encode(), 6) if any(values) else b""
    return Block(len(batches[0]), [*parts, told])


def _by_slot(slot: IntArray) -> NDArray[np.int64]:
    """The order of draws by slot, as they come within one; numpy sorts 16 bits in a third of the time."""
    is_small = len(slot) > 0 and int(slot.min()) >= 0 and int(slot.max()) < 1 << 16
    return np.argsort(slot.astype(np.uint16) if is_small else slot, kind="stable")


def block_of_lines(lines: Sequence[Mapping[str, Any]]) -> Block:
    """A block of lines that were read as JSON."""
    kept = ("batch", "step", "draws", "left_out")
    steps = [NO_STEP if line["step"] is None else line["step"] for line in lines]
    counts = [[len(line[name]) for line in lines] for name in ("draws", "left_out")]
    batches = [np.array(column, dtype=np.int64) for column in ([line["batch"] for line in lines], steps, *counts)]
    pairs = [pair for line in lines for pair in (*line["draws"], *line["left_out"])]
    columns = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    values = [{name: value for name, value in line.items() if name not in kept} for line in lines]
    return make_block(batches, columns[:, 0], columns[:, 1], values)


def read_blocks(file: Path) -> Iterator[Block]:
    """The blocks of a file, up to its end or to one that was not completely written."""
    with file.open("rb") as stream:
        while (block := _next_block(stream)) is not None:
            yield block


def num_lines(file: Path) -> int:
    """Lines of a file, of either form."""
    if file.suffix == ENDING:
        return sum(block.num_lines for block in read_blocks(file))
    return file.read_bytes().count(b"\n")


def _next_block(stream: BinaryIO) -> Block | None:
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    mark, count, *sizes, checksum = _HEAD.unpack(head)
    if mark != _MARK or sum(sizes) > _MAX_PART_BYTES:
        return None
    body = stream.read(sum(sizes))
    if len(body) < sum(sizes) or zlib.crc32(body) != checksum:
        return None
    ends = np.cumsum(sizes).tolist()
    return Block(count, [body[end - size : end] for end, size in zip(ends, sizes, strict=True)])


def _pack(columns: Sequence[IntArray]) -> bytes:
    """Columns as differences, each of the least width that holds them."""
    packed = []
    for column in columns:
        steps = np.diff(column) if len(column) else column
        reach = max(int(steps.max()), -int(steps.min()) - 1) if len(steps) else 0
        width = next(place for place, dtype in enumerate(_WIDTHS) if reach <= np.iinfo(dtype).max)
        first = int(column[0]) if len(column) else 0
        packed += [_COLUMN.pack(width, len(column), first), steps.astype(_WIDTHS[width]).tobytes()]
    return b"".join(packed)


def _unpack(data: bytes) -> list[IntArray]:
    columns, place = [], 0
    while place < len(data):
        width, length, first = _COLUMN.unpack_from(data, place)
        place += _COLUMN.size
        steps = np.frombuffer(data, _WIDTHS[width], max(0, length - 1), place)
        place += steps.nbytes
        column = np.empty(length, dtype=np.int64)
        if length:
            column[0] = first
            np.cumsum(steps, out=column[1:], dtype=np.int64)
            column[1:] += first
        columns.append(column)
    return columns
