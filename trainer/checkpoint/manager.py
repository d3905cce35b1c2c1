"""Saving during training: the loop waits for a copy, a thread of each rank writes it, the first rank commits.

    begin: copy to the host, start the writer          (the loop is blocked)
    ...    training continues; each step's sums count the ranks whose writer is done
    finish: agree, COMMIT, rename, start the deleter   (the loop is blocked for a few small files)
    close: wait for both threads                       (nothing of this process touches the checkpoints after it)

Threads only read and write files. Ranks communicate only in their main threads, at the same step.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from models.common.cores import unbound
from models.common.threads import WaitedThread
from trainer.checkpoint.format import Fragment, RankShard, Stamp, commit, name_of, remove_old, stamp_of, take_rank_shard
from trainer.distributed.context import DistributedContext


@dataclass
class PendingCheckpoint:
    """A checkpoint that is being written on this rank."""

    temporary: Path
    final: Path
    state: dict[str, Any]
    started_s: float
    writer: WaitedThread | None = None
    entries: dict[str, Any] = field(default_factory=dict)
    """Manifest entries of the files that the writer wrote."""
    fault: str = "its writer has not ended"

    def write(self, shard: RankShard, before: Sequence[Callable[[], None]]) -> None:
        """Run by the writer: `before`, then this rank's files."""
        try:
            for push in before:
                push()
            self.entries = shard.write(self.temporary)
            self.fault = ""
        except Exception as error:  # it would be lost with the thread; `finish` reports it to every rank
            self.fault = str(error) or repr(error)


class CheckpointManager:
    """Writes checkpoints of one stage into `root`, one at a time.

    Args:
        keep: how many of the newest checkpoints are kept.
        token: names this start of the run, so that two starts never write into one temporary directory.
        before: called by every rank's writer before its files: they push the files that the checkpoint relies on to the
            disk.
        check: called on the first rank before a commit; it ends the process where another start has taken over.
        clock: seconds that this process ran, by which saves are timed.
    """

    def __init__(
        self,
        root: Path,
        ranks: DistributedContext,
        *,
        keep: int,
        token: str,
        before: Sequence[Callable[[], None]] = (),
        check: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._ranks, self._keep, self._token = root, ranks, keep, token
        self._before, self._check, self._clock = before, check, clock
        self._pending: PendingCheckpoint | None = None
        self._buffers: dict[str, Tensor] = {}
        self._deleter: WaitedThread | None = None
        self._sound: set[Stamp] = set()
        """Checkpoints that this start wrote or has verified: each is hashed once."""
        self.longest_s = 0.0
        """Seconds from the beginning of a save to its commit, the longest so far."""
        self.blocked_s = 0.0
        """Seconds that the loop has waited for saves, in total."""

    def trust(self, checkpoint: Path) -> None:
        """Take a checkpoint for sound that was verified when this start resumed from it: it is not hashed again."""
        self._sound.add(stamp_of(checkpoint))

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written; the same on every rank."""
        return self._pending is not None

    @property
    def name(self) -> str:
        """The directory's name of the checkpoint being written; empty without one."""
        return self._pending.final.name if self._pending is not None else ""

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing left to write, so `finish` would not wait for it."""
        return self._pending is None or self._pending.writer is None or self._pending.writer.has_ended

    def begin(
        self, step: int, *, fragments: Iterable[Fragment], inherited: Sequence[Fragment], state: dict[str, Any]
    ) -> None:
        """Copy this rank's part and start writing it.

        Every rank must call it after the same step, with no checkpoint being written.

        Args:
            step: optimizer steps so far; the checkpoint's name.
            fragments: this rank's slices; they may change once this returns.
            inherited: what this rank writes of weights that are not trained in this stage; they must not change.
            state: becomes state.json; the first rank's is used.
        """
        assert self._pending is None
        started_s = self._clock()
        self._join_deleter()  # it would remove the new files as remains
        final = self._root / name_of(step)
        pending = PendingCheckpoint(self._root / f".{final.name}.{self._token}.tmp", final, state, started_s)
        shard = take_rank_shard(fragments, inherited, self._ranks, self._buffers)
        pending.writer = WaitedThread(pending.write, (shard, self._before), name="checkpoint-writer")
        with unbound():
            pending.writer.start()
        self._pending = pending
        self.blocked_s += self._clock() - started_s

    def finish(self, spare: Collection[str] = ()) -> str:
        """Wait for every rank's files and commit them. A collective call.

        After an error the older checkpoints are unchanged and no incomplete files are left.

        Args:
            spare: names of checkpoints that are kept however old they are.

        Returns:
            The error, the same on every rank, or "".
        """
        pending, started_s = self._pending, self._clock()
        assert pending is not None
        assert pending.writer is not None
        pending.writer.wait()
        self._pending = None
        answers = self._ranks.gather((pending.entries, pending.fault))
        faults = [f"rank {rank}: {fault}" for rank, (_, fault) in enumerate(answers) if fault]
        if self._ranks.is_first:
            faults = faults or self._commit(pending, [entries for entries, _ in answers])
            if faults:
                shutil.rmtree(pending.temporary, ignore_errors=True)
            else:
                self._sound.add(stamp_of(pending.final))
                self._start_deleter({*spare, pending.final.name})
        faults = self._ranks.gather(faults)[0]
        self.longest_s = max(self.longest_s, self._clock() - pending.started_s)
        self.blocked_s += self._clock() - started_s
        return f"checkpoint {pending.final.name} not written: {'; '.join(faults)}" if faults else ""

    def close(self) -> None:
        """Wait for the threads that write and delete. May be called at any time, after an error too, and again.

        An unfinished checkpoint is never committed; its files stay in a hidden directory that the next commit in `root`
        removes.
        """
        if self._pending is not None and self._pending.writer is not None:
            self._pending.writer.wait()
        self._pending = None
        self._join_deleter()

    def _commit(self, pending: PendingCheckpoint, entries: list[dict[str, Any]]) -> list[str]:
        """The first rank's part of `finish`; returns the error, or ""."""
        self._check()
        files = {name: entry for of_rank in entries for name, entry in of_rank.items()}
        try:
            commit(pending.temporary, pending.final, pending.state, files)
        except OSError as error:
            return [str(error)]
        return []

    def _start_deleter(self, spare: Collection[str]) -> None:
        """Delete old checkpoints in a thread: some file systems take seconds to remove large files."""
        arguments = (self._root, self._keep, tuple(spare), self._sound)
        self._deleter = WaitedThread(remove_old, arguments, name="checkpoint-deleter")
        with unbound():
            self._deleter.start()

    def _join_deleter(self) -> None:
        if self._deleter is not None:
            self._deleter.wait()
            self._deleter = None
