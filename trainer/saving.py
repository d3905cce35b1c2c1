"""Saving beside training: the loop waits for a copy, a thread of each rank writes it, the first rank commits.

    begin: copy to the host, start the thread      (the loop is held)
    ...    steps go on; each step's sums say on how many ranks the thread is done
    finish: agree, COMMIT, rename, drop old ones    (the loop is held for a few small files)

Threads only write; everything that ranks say to each other is said by the main threads, at the same step on all.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint import Fragment, Share, commit, name_of, remove_old, take_share
from trainer.ranks import Ranks


@dataclass
class Write:
    """A checkpoint on its way."""

    temporary: Path
    final: Path
    state: dict[str, Any]
    began_s: float
    thread: threading.Thread | None = None
    entries: dict[str, Any] = field(default_factory=dict)
    fault: str = "its writer has not ended"

    def run(self, share: Share, before: Sequence[Callable[[], None]]) -> None:
        """The thread: write this rank's files."""
        try:
            for push in before:
                push()
            self.entries = share.write(self.temporary)
            self.fault = ""
        except Exception as error:  # whatever it is, the main thread must hear of it
            self.fault = str(error) or repr(error)


class Saver:
    """Writes checkpoints of one stage into `root`, one at a time.

    Args:
        token: of this start of the run, so that two starts never write into one temporary directory.
        before: called on every rank's thread ahead of its files: they push what the checkpoint relies on to the disk.
        check: called on the first rank before a commit; it ends the process where another has taken the run over.
    """

    def __init__(
        self,
        root: Path,
        ranks: Ranks,
        *,
        keep: int,
        token: str,
        before: Sequence[Callable[[], None]] = (),
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._root, self._ranks, self._keep, self._token = root, ranks, keep, token
        self._before, self._check = before, check
        self._write: Write | None = None
        self._buffers: dict[str, Tensor] = {}
        self._cleaning: threading.Thread | None = None
        self.longest_s = 0.0
        """From the beginning of a save to its commit, the longest so far."""
        self.held_s = 0.0
        """For how long the loop has waited for saves in all."""

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is on its way; the same on every rank."""
        return self._write is not None

    @property
    def name(self) -> str:
        """Of the checkpoint on its way."""
        return self._write.final.name if self._write is not None else ""

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._write is None or self._write.thread is None or not self._write.thread.is_alive()

    def begin(
        self, step: int, *, fragments: Iterable[Fragment], given: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        """Copy the state and start to write it. Every rank must call it at the same step, with none on its way."""
        assert self._write is None
        began_s = time.monotonic()
        self.close()
        final = self._root / name_of(step)
        write = Write(self._root / f".{final.name}.{self._token}.tmp", final, state, began_s)
        share = take_share(fragments, given, self._ranks, self._buffers)
        write.thread = threading.Thread(target=write.run, args=(share, self._before), name="checkpoint")
        write.thread.start()
        self._write = write
        self.held_s += time.monotonic() - began_s

    def close(self) -> None:
        """Wait until old checkpoints are removed."""
        if self._cleaning is not None:
            self._cleaning.join()

    def finish(self, spare: Collection[str] = ()) -> str:
        """Wait for every rank's files and commit them; what went wrong, or "". Every rank must call it at once.

        After a fault the older checkpoints are as they were and nothing half-written is left. `spare` names
        checkpoints that stay however old they are.
        """
        write, started_s = self._write, time.monotonic()
        assert write is not None
        assert write.thread is not None
        write.thread.join()
        self._write = None
        answers = self._ranks.gather((write.entries, write.fault))
        faults = [f"rank {rank}: {fault}" for rank, (_, fault) in enumerate(answers) if fault]
        if self._ranks.is_first and not faults:
            self._check()
            entries = {name: entry for share, _ in answers for name, entry in share.items()}
            try:
                commit(write.temporary, write.final, write.state, entries)
            except OSError as error:
                faults = [str(error)]
        if self._ranks.is_first:
            if faults:
                shutil.rmtree(write.temporary, ignore_errors=True)
            else:
                self._cleaning = threading.Thread(target=remove_old, args=(self._root, self._keep, tuple(spare)))
                self._cleaning.start()  # large files take their time to go
        faults = self._ranks.gather(faults)[0]
        self.longest_s = max(self.longest_s, time.monotonic() - write.began_s)
        self.held_s += time.monotonic() - started_s
        return f"checkpoint {write.final.name} not written: {'; '.join(faults)}" if faults else ""
