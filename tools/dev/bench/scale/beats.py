"""Heartbeats: files created and written a second by all ranks together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.distributed.context import DistributedContext
from trainer.distributed.heartbeats import Heartbeat, write_heartbeat
from trainer.distributed.watchdog import Watchdog

RANKS_A_NODE = 8
SECONDS = 60.0


@dataclass
class Beats:
    """Over a simulated minute of a running stage."""

    files: int
    """Made when it starts."""
    created_a_second: float
    written_a_second: float


def measure(directory: Path, num_ranks: int) -> Beats:
    """Write what so many ranks write in a minute; a file counts as created where its inode is new."""
    directory.mkdir(parents=True)
    ranks = [DistributedContext(rank, num_ranks, rank % RANKS_A_NODE) for rank in range(num_ranks)]
    interval_s = Watchdog(directory, ranks[0], 900.0).interval_s
    num_rounds, created, known = int(SECONDS / interval_s), 0, _inodes(directory, ranks)
    files = len(known)
    for number in range(num_rounds):
        _inodes(directory, ranks, number)
        now = {path.stat().st_ino for path in directory.iterdir()}
        created, known = created + len(now - known), now
    return Beats(files, created / SECONDS, num_ranks / interval_s)


def _inodes(directory: Path, ranks: list[DistributedContext], step: int = 0) -> set[int]:
    for each in ranks:
        write_heartbeat(directory, each, Heartbeat(each.rank, "node", 1, step, "forward", 0.0, float(step)))
    return {path.stat().st_ino for path in directory.iterdir()}
