"""Reading a stage's ledger: its restarts, and which of their lines count.

    attempt_0001  batches 1 ... 9          of these 1 ... 6 count, since the next one resumed behind batch 6
    attempt_0002  batches 7 ... 20         all of these

Lines are read block by block, so memory does not grow with the ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from models.common.documents import read_as
from models.common.files import each_line
from trainer.ledger.blocks import ENDING, Block, block_of_lines, read_blocks

FOLDER, HEAD = "attempt_", "attempt.json"
"""Names on disk, from when a restart was called an attempt."""

_LINES_PER_BLOCK = 1024
_NO_LIMIT = 1 << 62

_Count = Annotated[int, Field(ge=0)]
_Pair = Annotated[list[_Count], Field(min_length=2, max_length=2)]


class _Head(TypedDict):
    """attempt.json."""

    resumed_at: _Count
    world_size: _Count


class _Line(TypedDict):
    """A line of a rank's file of version 0.1."""

    batch: _Count
    step: _Count | None
    draws: list[_Pair]
    left_out: list[_Pair]
    loss: NotRequired[float]


@dataclass(frozen=True)
class Restart:
    """The ledger's records of one start of a stage."""

    number: int
    resumed_at: int
    """Global batches that were done before it."""
    world_size: int
    blocks: Callable[[], Iterator[Block]]
    """Reads the lines of all ranks, rank by rank; each rank has one for each global batch."""


class Counting(NamedTuple):
    """A restart, and the global batches (first, last] of which its lines count."""

    restart: Restart
    first: int
    last: int

    def lines(self, batch: int) -> list[dict[str, Any]]:
        """The lines of all ranks for a global batch."""
        return [line for block in self.restart.blocks() for line in block.lines() if line["batch"] == batch]


def read_restarts(root: Path) -> list[Restart]:
    """Every restart in a stage's `ledger` directory, the oldest first; one killed before it had a head is left out."""
    restarts = []
    named = (path for path in root.glob(f"{FOLDER}*") if restart_number(path))
    for directory in sorted(named, key=restart_number):  # by number: as names, 10000 precedes 9999
        if not (directory / HEAD).is_file():
            continue
        head = read_as(directory / HEAD, _Head)
        files = sorted(path for path in directory.glob("rank_*") if path.suffix in (ENDING, ".jsonl"))
        number, resumed_at = restart_number(directory), head["resumed_at"]
        restarts.append(Restart(number, resumed_at, head["world_size"], _reader(files)))
    return restarts


def blocks_of(file: Path) -> Iterator[Block]:
    """The blocks of a rank's file, of either form. Raises InputError where a line of JSON is not one of a ledger."""
    if file.suffix == ENDING:
        yield from read_blocks(file)
        return
    waiting: list[dict[str, Any]] = []
    for line in each_line(file, _Line):
        waiting.append(line)
        if len(waiting) == _LINES_PER_BLOCK:
            yield block_of_lines(waiting)
            waiting = []
    if waiting:
        yield block_of_lines(waiting)


def _reader(files: Sequence[Path]) -> Callable[[], Iterator[Block]]:
    return lambda: chain.from_iterable(map(blocks_of, files))


def counting(restarts: Sequence[Restart]) -> list[Counting]:
    """Which batches of each restart count: a later one supersedes what lies beyond the batch it resumes after."""
    found, last = [], _NO_LIMIT
    for restart in reversed(restarts):
        found.append(Counting(restart, restart.resumed_at, last))
        last = min(last, restart.resumed_at)
    return [each for each in reversed(found) if each.first < each.last]


def find_step(restarts: Sequence[Restart], step: int) -> tuple[int, list[dict[str, Any]]] | None:
    """The last global batch that counts and became a step: its number, and the lines of all ranks."""
    for each in reversed(counting(restarts)):
        batches: set[int] = set()
        for block in each.restart.blocks():
            is_it = (block.step == step) & (block.batch > each.first) & (block.batch <= each.last)
            batches.update(block.batch[np.flatnonzero(is_it)].tolist())
        if batches:
            return max(batches), each.lines(max(batches))
    return None


def restart_number(directory: Path) -> int:
    """A restart's number, from 1; 0 where the directory is not the ledger's."""
    number = directory.name.removeprefix(FOLDER)
    return int(number) if number.isascii() and number.isdigit() else 0
