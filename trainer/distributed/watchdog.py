"""Whether every rank makes progress, and which one does not.

    main thread: mark("forward") ...      watchdog thread: RUN/STAGE/ranks/00000.jsonl, every few seconds
                                           own mark too old -> read the others' -> name the straggler -> stacks -> exit
                                           another rank has told that it failed -> its line -> exit

A collective waits without end for a rank that was stopped, and its error does not name a rank that died. Each rank
writes its phase and a heartbeat; one without progress for `timeout_s` reads the others' and names the straggler.
There is no communication here, since it must work when communication does not. `timeout_s` is time in
which this process ran (`trainer.distributed.running_time`): a suspended job continues when it is resumed.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

from models.common.exit_codes import ExitCode
from trainer.distributed.context import DistributedContext
from trainer.distributed.failure_notice import Failure, FailureNotice
from trainer.distributed.heartbeats import Heartbeat, read_heartbeats, write_heartbeat
from trainer.distributed.running_time import RunningTime

logger = logging.getLogger(__name__)

MAX_INTERVAL_S = 5.0
NUM_INTERVALS_PER_TIMEOUT = 5
NUM_SILENT_INTERVALS = 4
"""Missed heartbeats after which a rank counts as silent: a slow disk or a busy core may cost one or two."""

STALE_S = 60.0
"""How long a file system may show what has been replaced: NFS keeps a file's attributes for so long (acregmax)."""

MOST_WRITES_PER_S = 100
"""Of all ranks together; a heartbeat of each of 1,024 ranks every 5 s would be 205."""


class _Position(NamedTuple):
    """The main thread's step and phase."""

    step: int
    phase: str
    since_s: float
    """Unix seconds, for the other ranks."""
    entered_s: float
    """The same moment in running time: neither a wall clock that is set nor a job that was suspended ends a run."""


class Watchdog:
    """Writes this rank's heartbeats from `start` to `close`, and ends the process when the run hangs.

    Args:
        directory: RUN/STAGE/ranks, shared by all ranks.
        ranks: this rank among the others.
        timeout_s: how long a phase may last; longer than the slowest one, a checkpoint or a validation of one batch.
    """

    def __init__(self, directory: Path, ranks: DistributedContext, timeout_s: float) -> None:
        self._directory, self._ranks, self._timeout_s = directory, ranks, timeout_s
        at_most_s = max(MAX_INTERVAL_S, ranks.world_size / MOST_WRITES_PER_S)
        self.interval_s = min(at_most_s, timeout_s / NUM_INTERVALS_PER_TIMEOUT)
        """Seconds between two heartbeats of a rank."""
        self._running = RunningTime(2 * self.interval_s)
        self._position = _Position(0, "starting", time.time(), 0.0)
        """One attribute, so that the thread never reads half of a change."""
        self._notice, self._has_failed = FailureNotice(directory), False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        """Write the first heartbeat and start the thread; returns itself."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._notice.open()
        self.mark("starting", 0)
        self._write()
        self._thread.start()
        return self

    def mark(self, phase: str, step: int) -> None:
        """Record that the main thread enters a phase of a step; does no I/O, the watchdog thread writes it later."""
        self._position = _Position(step, phase, time.time(), self.running_s())

    def running_s(self) -> float:
        """Seconds in which this process ran since the watchdog was made; exact while its thread looks."""
        return self._running.seconds()

    def close(self) -> None:
        """End the thread and write a last heartbeat: this rank has ended and waits for nobody."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(self.interval_s)  # a disk that hangs must not keep the run from ending
        self.mark("ended", self._position.step)
        self._write()

    def exit_for_lost_rank(self, reason: str) -> NoReturn:
        """End the process after a collective failed for this one-line `reason`, and name who has stopped writing."""
        time.sleep(self.interval_s)  # a dying process gets time to disappear
        failure = self._notice.read()
        if failure is not None:
            self._exit_for(failure)
        logger.error(
            f"rank {self._ranks.rank}: {self._straggler()} ({reason}); the last checkpoint stands, "
            "start the same command again"
        )
        os._exit(ExitCode.LOST_RANK)

    def tell_failure(self, line: str, code: int) -> None:
        """Tell the other ranks why this one ends, so that they end too: with `code`, and in seconds."""
        self._has_failed = True
        self._notice.tell(Failure(self._ranks.rank, socket.gethostname(), code, line))

    def _run(self) -> None:
        while not self._closed.wait(self.interval_s):
            self._write()
            failure = self._notice.read()
            if failure is not None and not self._has_failed and not self._closed.is_set():
                self._exit_for(failure)
            now_s, position = self.running_s(), self._position
            if now_s - position.entered_s > self._timeout_s and not self._closed.is_set():
                self._exit_stalled(position)

    def _exit_for(self, failure: Failure) -> NoReturn:
        if failure.code != ExitCode.LOST_RANK:
            logger.error(failure.line)
        else:
            logger.error(
                f"rank {self._ranks.rank}: rank {failure.rank} ({failure.host}) failed: {failure.line}; "
                "the last checkpoint stands, start the same command again"
            )
        os._exit(failure.code)

    def _exit_stalled(self, position: _Position) -> NoReturn:
        stacks = self._directory / f"{self._ranks.rank:05d}.stacks.txt"
        logger.error(
            f"rank {self._ranks.rank} has been at {position.phase} of step {position.step} for "
            f"{self._timeout_s:.0f} s: "
            f"{self._straggler()}; stacks in {stacks}; the last checkpoint stands, start the same command again"
        )
        try:
            with stacks.open("w", encoding="utf-8") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
        finally:
            os._exit(ExitCode.LOST_RANK)

    def _straggler(self) -> str:
        silent_s = silence(self.interval_s, self._timeout_s)
        return find_straggler(
            read_heartbeats(self._directory, self._ranks.world_size), self._ranks.world_size, silent_s
        )

    def _write(self) -> None:
        position = self._position
        heartbeat = Heartbeat(
            rank=self._ranks.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=position.step,
            phase=position.phase,
            since_s=position.since_s,
            written_s=time.time(),
        )
        try:
            write_heartbeat(self._directory, self._ranks, heartbeat)
        except OSError:  # a full disk is reported by the checkpoint's writer
            return


def exit_at_start(ranks: DistributedContext, reason: str) -> NoReturn:
    """End the process where ranks lose each other before any has a watchdog; the lost one printed its own error."""
    logger.error(
        f"rank {ranks.rank}: a rank ended or stands still while the run starts ({reason}); "
        "look at what the others printed, then start the same command again"
    )
    os._exit(ExitCode.LOST_RANK)


@contextmanager
def limited_start(ranks: DistributedContext, timeout_s: float) -> Iterator[None]:
    """End the process where the block takes longer than `timeout_s`, as when one of the ranks that join was stopped.

    torch's TCPStore has a timeout for connecting, but reads the answers of rank 0 without one (TCPStore.cpp, doWait): a
    rank 0 that was stopped between listening and answering would block the others without end.
    """
    is_over, interval_s = threading.Event(), min(1.0, timeout_s / NUM_INTERVALS_PER_TIMEOUT)

    def watch() -> None:
        running = RunningTime(2 * interval_s)
        while not is_over.wait(interval_s):
            if running.seconds() > timeout_s and not is_over.is_set():
                exit_at_start(ranks, f"the ranks have not met within {timeout_s:.0f} s")

    threading.Thread(target=watch, name="limited-start", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def silence(interval_s: float, timeout_s: float) -> float:
    """Seconds without a heartbeat after which a rank counts as silent.

    A file system that shows what is `STALE_S` old makes nobody silent, unless the whole limit is hardly longer.

    Args:
        interval_s: between two heartbeats of a rank.
        timeout_s: how long a phase may last.
    """
    missed_s = NUM_SILENT_INTERVALS * interval_s
    return max(missed_s, min(missed_s + STALE_S, timeout_s / 2))


def find_straggler(heartbeats: Sequence[Heartbeat], world_size: int, silent_s: float) -> str:
    """Name the ranks that block a run: those without a heartbeat; else those that fell silent; else those behind.

    The newest heartbeat counts as now, so machines' clocks need to agree only to a few intervals.

    Args:
        heartbeats: the last one of each rank that wrote any.
        world_size: how many ranks there should be.
        silent_s: from `silence`.
    """
    absent = sorted(set(range(world_size)) - {heartbeat.rank for heartbeat in heartbeats})
    if absent:
        return f"rank {', '.join(map(str, absent))} never gave a sign of life"
    now_s = max(heartbeat.written_s for heartbeat in heartbeats)
    silent = [heartbeat for heartbeat in heartbeats if now_s - heartbeat.written_s > silent_s or heartbeat.is_dead]
    if silent:
        named = ", ".join(f"{each.who} silent for {now_s - each.written_s:.0f} s" for each in silent)
        return f"{named}: killed, stopped, or its machine is cut off"
    last_step = max(heartbeat.step for heartbeat in heartbeats)
    (usual_phase, _), *_ = Counter(heartbeat.phase for heartbeat in heartbeats).most_common(1)
    behind = [each for each in heartbeats if each.step < last_step]
    behind = behind or [each for each in heartbeats if each.phase != usual_phase]
    if behind:
        named = ", ".join(
            f"{each.who} at {each.phase} of step {each.step} for {now_s - each.since_s:.0f} s" for each in behind
        )
        return f"the others wait for {named}"
    return f"all ranks are at {usual_phase} of step {last_step}: the network between them, or a collective"
