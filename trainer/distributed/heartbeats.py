"""Where ranks leave their heartbeats: one file for each node, of which every rank of the node has a part.

    RUN/STAGE/ranks/00008.jsonl    ranks 8 ... 15, each a line of `LINE_BYTES` at a place of its own

A part is written in place: after the start of a run nothing is created or renamed, which is what costs a shared file
system most. Each write opens and closes the file, since NFS passes on what was written when a file is closed, and looks
for what is new when one is opened. Ranks are numbered node by node, and the file is named after the node's first;
numbered in any other way, the parts of two ranks still differ.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from models.common.documents import parse
from models.common.errors import InputError
from trainer.distributed.context import DistributedContext

LINE_BYTES = 512
_TRIES = 3
_PAUSE_S = 0.05


@dataclass(frozen=True)
class Heartbeat:
    """A rank's part of its node's file; times are Unix seconds of the rank's own machine."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since_s: float
    """When the rank entered this phase."""
    written_s: float

    @property
    def who(self) -> str:
        """The rank for messages: number, machine, process."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    @property
    def is_dead(self) -> bool:
        """Whether the process is gone, where that can be seen: on the same machine."""
        return self.host == socket.gethostname() and not Path(f"/proc/{self.pid}").exists()


def file_of(directory: Path, ranks: DistributedContext) -> Path:
    """The file of a rank's node."""
    return directory / f"{ranks.rank - ranks.local_rank:05d}.jsonl"


def write_heartbeat(directory: Path, ranks: DistributedContext, heartbeat: Heartbeat) -> None:
    """Replace a rank's part of its node's file. Raises OSError where the disk refuses."""
    line = json.dumps(asdict(heartbeat)).encode()
    assert len(line) < LINE_BYTES, "hosts and phases have short names"
    descriptor = os.open(file_of(directory, ranks), os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        os.pwrite(descriptor, line.ljust(LINE_BYTES - 1) + b"\n", ranks.local_rank * LINE_BYTES)
    finally:
        os.close(descriptor)


def read_heartbeats(directory: Path, world_size: int) -> list[Heartbeat]:
    """The last heartbeat of every rank that has written one, by rank."""
    newest: dict[int, Heartbeat] = {}
    for file in sorted(directory.glob("[0-9]*.jsonl")):
        for heartbeat in _read(file):
            known = newest.get(heartbeat.rank)
            if heartbeat.rank < world_size and (known is None or heartbeat.written_s > known.written_s):
                newest[heartbeat.rank] = heartbeat
    return [newest[rank] for rank in sorted(newest)]


def _read(file: Path) -> Iterator[Heartbeat]:
    """The parts of a file; one that is being written is looked at again."""
    found: dict[int, Heartbeat] = {}
    for number in range(_TRIES):
        try:
            content = file.read_bytes()
        except OSError:
            break
        parts = [content[start : start + LINE_BYTES] for start in range(0, len(content), LINE_BYTES)]
        written = {place: part for place, part in enumerate(parts) if part.strip(b"\0 \n")}
        for place in written.keys() - found.keys():
            try:
                value = parse(written[place], file)
                found[place] = Heartbeat(**{each.name: value[each.name] for each in fields(Heartbeat)})
            except (InputError, KeyError, TypeError):
                continue
        if len(found) == len(written):
            break
        time.sleep(_PAUSE_S * (number < _TRIES - 1))
    yield from found.values()
