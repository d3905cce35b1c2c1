"""Which draws each global batch was made of: the record that `sightline audit` proves a run by.

    RUN/STAGE/ledger/attempt_0003/attempt.json      when, where, on how many ranks, from which batch it goes on
                                  rank_00001.jsonl  a line for each global batch: what became of it, its draws

Nothing is ever rewritten. What an attempt did after the batch from which the next one goes on does not count: readers
know it by the number. A line is in the file before the step's weights are in a checkpoint.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.sample import Row
from models.files import LineFile, read_lines, write_json
from models.source import read_json
from trainer.ranks import Ranks


class Ledger:
    """One rank's lines of one attempt (a start of the stage)."""

    def __init__(self, root: Path, ranks: Ranks, *, resumed_at: int, facts: dict[str, Any]) -> None:
        """`resumed_at` is the number of global batches that lie behind the attempt; every rank must call this."""
        if ranks.is_first:
            numbers = [int(path.name.split("_")[1]) for path in root.glob("attempt_*")]
            self.attempt = max(numbers, default=0) + 1
            (root / f"attempt_{self.attempt:04d}").mkdir(parents=True)
        else:
            self.attempt = 0
        self.attempt = int(ranks.gather(self.attempt)[0])
        directory = root / f"attempt_{self.attempt:04d}"
        if ranks.is_first:
            started = {"host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
            write_json(
                directory / "attempt.json",
                {"resumed_at": resumed_at, "world_size": ranks.world_size, **started, **facts},
            )
        self._lines = LineFile(directory / f"rank_{ranks.rank:05d}.jsonl")

    def write(self, batch: int, step: int | None, rows: Sequence[Row], left_out: Sequence[Row], **more: Any) -> None:
        """Global batch `batch` became optimizer step `step` (None: it was skipped) with these local rows."""
        line = {"batch": batch, "step": step, "draws": _draws(rows), "left_out": _draws(left_out), **more}
        self._lines.write(line)

    def sync(self) -> None:
        """Push the lines to the disk: before a checkpoint that relies on them. OSError where it does not take them."""
        self._lines.sync()

    def close(self) -> None:
        """No more lines."""
        self._lines.close()


@dataclass(frozen=True)
class Attempt:
    """What one start of a stage left in the ledger."""

    number: int
    resumed_at: int
    world_size: int
    lines: dict[int, list[dict[str, Any]]]
    """Global batch -> the lines of its ranks."""


def read_attempts(root: Path) -> list[Attempt]:
    """All attempts, the oldest first; one that was killed before it had a head counts for nothing."""
    attempts = []
    for directory in sorted(root.glob("attempt_*")):
        if not (directory / "attempt.json").is_file():
            continue
        head = read_json(directory, "attempt.json")
        lines: dict[int, list[dict[str, Any]]] = {}
        for file in sorted(directory.glob("rank_*.jsonl")):
            for line in read_lines(file):
                lines.setdefault(line["batch"], []).append(line)
        attempts.append(Attempt(int(directory.name.split("_")[1]), head["resumed_at"], head["world_size"], lines))
    return attempts


def standing(attempts: Sequence[Attempt]) -> dict[int, tuple[Attempt, list[dict[str, Any]]]]:
    """For each global batch the attempt and the lines that count: the last that got there before being superseded."""
    found: dict[int, tuple[Attempt, list[dict[str, Any]]]] = {}
    for attempt in attempts:
        for batch in [batch for batch in found if batch > attempt.resumed_at]:
            del found[batch]
        found |= {batch: (attempt, lines) for batch, lines in attempt.lines.items()}
    return found


def _draws(rows: Sequence[Row]) -> list[list[int]]:
    return [[sample.draw.slot, sample.draw.n] for row in rows for sample in row]
