"""Which draws each global batch was made of: the record that `sightline audit` proves a run by.

    RUN/STAGE/ledger/attempt_0003/attempt.json       when, where, on how many ranks, after which batch it resumes
                                  rank_00001.blocks  a line for each global batch: its outcome and its draws

A draw is (slot, n); `data_pipeline.sample_order` maps it to the sample, so names are not stored here. A restart is
one start of the stage, the first one included; on disk it is called an attempt. Nothing is ever rewritten: what a
restart did beyond the batch after which the next one resumes does not count, which readers see from the number.

Lines wait in memory and are written in blocks (`trainer.ledger.blocks`), since a thousand ranks that write at every
step would keep a shared file system busy. They are on the disk before the step's weights are in a checkpoint, so
what is lost with a killed process is what does not count anyway. The first rank writes every line at once: whoever
watches a run looks there. `sightline ledger` prints lines; version 0.1 wrote them as JSON, which is still read.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.sample import Row
from models.common.files import AppendFile, write_json
from trainer.distributed.context import DistributedContext
from trainer.ledger.blocks import ENDING, NO_STEP, make_block
from trainer.ledger.restarts import FOLDER, HEAD, restart_number

LONGEST_WAIT_S = 300.0
"""Lines are written after this long, and before every checkpoint."""
MAX_WAITING_DRAWS = 1 << 16


class Ledger:
    """One rank's lines of one restart. `Ledger.open` begins a restart on all ranks.

    Args:
        waits: whether lines may wait in memory until the next `sync`.
        clock: seconds, by which a wait is limited.
    """

    def __init__(
        self, file: AppendFile, restart: int, *, waits: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file, self._waits, self._clock = file, waits, clock
        self.restart = restart
        """The restart's number, from 1."""
        self._lines: list[tuple[int, int, int, int]] = []
        self._draws: list[tuple[int, int]] = []
        self._values: list[dict[str, Any]] = []
        self._since_s = 0.0

    @classmethod
    def open(cls, root: Path, ranks: DistributedContext, *, resumed_at: int, facts: dict[str, Any]) -> Ledger:
        """Begin a restart; a collective, which every rank must call.

        Args:
            root: the stage's `ledger` directory.
            resumed_at: global batches that were done before the restart.
            facts: further values of attempt.json.
        """
        restart = 0
        if ranks.is_first:
            restart = 1 + max((restart_number(path) for path in root.glob(f"{FOLDER}*")), default=0)
            directory = root / f"{FOLDER}{restart:04d}"
            directory.mkdir(parents=True)
            started = {"host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
            head = {"resumed_at": resumed_at, "world_size": ranks.world_size, **started, **facts}
            write_json(directory / HEAD, head)
        restart = int(ranks.gather(restart)[0])
        file = root / f"{FOLDER}{restart:04d}" / f"rank_{ranks.rank:05d}{ENDING}"
        return cls(AppendFile(file), restart, waits=not ranks.is_first)

    def write(self, batch: int, step: int | None, rows: Sequence[Row], left_out: Sequence[Row], **more: Any) -> None:
        """Record the outcome of this rank's rows of a global batch.

        Args:
            batch: its number, from 1.
            step: the optimizer step that it became; None where it was skipped.
            rows: the rows that were trained on.
            left_out: rows that were not finite, which the step was computed without.
            more: further values of the line, as JSON.
        """
        kept, gone = _draws(rows), _draws(left_out)
        if not self._lines:
            self._since_s = self._clock()
        self._lines.append((batch, NO_STEP if step is None else step, len(kept), len(gone)))
        self._draws += kept
        self._draws += gone
        self._values.append(more)
        is_due = len(self._draws) >= MAX_WAITING_DRAWS or self._clock() - self._since_s >= LONGEST_WAIT_S
        if is_due or not self._waits:
            self._write_block()

    def sync(self) -> None:
        """Push the lines to the disk, before a checkpoint that relies on them. OSError on a full disk."""
        self._write_block()
        self._file.sync()

    def close(self) -> None:
        """Write what waits and close the file; nothing can be written afterwards."""
        self._write_block()
        self._file.close()

    def _write_block(self) -> None:
        lines, self._lines = self._lines, []
        draws, self._draws = self._draws, []
        values, self._values = self._values, []
        if lines:
            columns = np.array(draws, dtype=np.int64).reshape(-1, 2)
            batches = list(np.array(lines, dtype=np.int64).T)
            self._file.append(make_block(batches, columns[:, 0], columns[:, 1], values).to_bytes())


def _draws(rows: Sequence[Row]) -> list[tuple[int, int]]:
    return [(sample.ref.slot, sample.ref.n) for row in rows for sample in row]
