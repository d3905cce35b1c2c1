"""The start of a run, from its first moment to its first batch: what one rank cannot do ends all, with one line.

    rank 0   signals -> listens -> recipe, data, model, logs -> barrier -> first batch
    rank 1   signals -> meets   -> recipe, data, model, logs -> barrier -> first batch
                         |
                         +-- a fault of any rank is put into the store, where a thread of every other one finds it

While a run starts a rank may be anywhere: in an import, in a collective that waits for a rank which has failed, in a
read from a file system that hangs. So whatever must end it comes to threads that wait for nothing else:

    a signal     the kernel's handler writes it into a pipe (`signal.set_wakeup_fd`) whatever the main thread does
    a fault      lies in the ranks' store (torch's TCPStore), which rank 0 holds and torch's process group uses later
    rank 0 gone  the store's connection ends
    one stopped  its number in the store stands still (`pulse`), or the store of a stopped rank 0 answers nothing

Once the first batch is due, the loop hears signals (`preemption`) and the watchdog finds ranks that are lost.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from models.common.documents import parse
from models.common.errors import AwayError, InputError, user_message
from models.common.exit_codes import ExitCode
from trainer.distributed.context import DistributedContext
from trainer.distributed.failures import describe, is_lost_peer
from trainer.distributed.preemption import SIGNALS
from trainer.distributed.pulse import Pulse
from trainer.distributed.running_time import RunningTime
from trainer.distributed.store import HANDSHAKE_S, POLL_S, in_time, join_store

HEARING_S = 30.0
"""How long a rank that cannot start waits for the others to hear of it: those that are slow to import torch, too."""

_FAULT, _HEARD = "sightline/fault", "sightline/heard"


class Start:
    """This process's part in the start of a run.

    Args:
        run: what all ranks of this start have in common, and no other start has: a stranger at the port is told by it.
        timeout_s: how long this rank waits for rank 0 to listen, and then for a sign of life; may be set until `meet`.
    """

    def __init__(self, ranks: DistributedContext, run: str, timeout_s: float = HEARING_S) -> None:
        self.ranks, self._run, self.timeout_s = ranks, run, timeout_s
        self._store: Any = None
        self._has_tried = False
        """Whether it was asked to meet the others."""
        self._fault: tuple[int, str] | None = None
        self._is_over = threading.Event()
        self._clean_up: list[Callable[[], None]] = []
        self._pipe: tuple[int, int] | None = None

    def open(self) -> Start:
        """From now on a signal ends the process, whatever its main thread does; returns itself. Main thread only."""
        if self._pipe is None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            os.register_at_fork(after_in_child=_forget_pipe)  # a forked worker's signals are its own
        self._is_over = threading.Event()
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._watch(self._wait_for_signal, self._pipe[0])
        if self._store is not None:
            self._watch(self._wait_for_fault, self._store.clone())
        return self

    def at_end(self, clean_up: Callable[[], None]) -> None:
        """Have this called where the start ends in another thread; the last one first. Errors of it are passed over."""
        self._clean_up.append(clean_up)

    def meet(self) -> Any:
        """Join the ranks' store, which rank 0 holds, and hear of faults from now on; None for a process alone.

        Raises:
            InputError: the port is somebody else's, or the address none.
            DistNetworkError: rank 0 did not come.
        """
        if self.ranks.world_size > 1 and self._store is None:
            self._has_tried = True
            self._store = join_store(self.ranks, self._run, self.timeout_s)
            # A connection of its own: the main thread may wait in the other one.
            self._watch(self._wait_for_fault, in_time(self._store.clone, HANDSHAKE_S))
        return self._store

    @contextmanager
    def phase(self) -> Iterator[None]:
        """What stands inside belongs to the start: an exception of this rank ends the others with the same line."""
        if self._is_over.is_set():
            self.open()  # of the next stage
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._fail(error)
            raise

    def close(self) -> None:
        """The start is over: signals are the loop's, and a fault no longer ends the others from here."""
        if not self._is_over.is_set():
            self._is_over.set()
            signal.set_wakeup_fd(-1)
            self._clean_up.clear()

    def linger(self) -> None:
        """Where this rank's start failed, wait until the others have heard of it, or cannot. Called before the end."""
        if self._fault is None or self.ranks.world_size == 1:
            return
        with suppress(Exception):
            if self._store is None:
                if self._has_tried:
                    return  # that was the fault
                self._store = join_store(self.ranks, self._run, min(self.timeout_s, HEARING_S))
                self._tell()
            self._wait_until_heard(self._store)

    def _fail(self, error: BaseException) -> None:
        """Say what happened and tell the others. After a lost rank this ends the process: cleaning up would wait."""
        is_lost = self.ranks.world_size > 1 and is_lost_peer(error)
        if is_lost and self._store is not None:
            # Another rank may have ended because it told of a fault, which the thread finds with its next look.
            time.sleep(4 * POLL_S)
        self._is_over.set()
        self._fault = as_fault(error, self.ranks.rank)
        if self.ranks.world_size > 1:
            say(self._fault[1])
            if isinstance(error, InputError | AwayError | OSError):
                error.is_said = True  # type: ignore[union-attr]
            with suppress(Exception):  # the first rank may be stopped, and its store answers nothing
                in_time(self._tell, HANDSHAKE_S)
        if is_lost:
            self.linger()
            self._exit(self._fault[0])

    def _tell(self) -> None:
        if self._store is not None and self._fault is not None:
            code, line = self._fault
            if code not in (
                ExitCode.INPUT_ERROR,
                ExitCode.REQUEUE,
            ):  # the node of this rank alone is to blame (slurm/requeue.sh)
                code = ExitCode.LOST_RANK
            self._store.compare_set(_FAULT, "", _as_told(code, line, self.ranks.rank))
            self._store.add(_HEARD, 1)

    def _wait_until_heard(self, store: Any) -> None:
        """Rank 0 holds the store: it goes last."""
        running = RunningTime(2 * POLL_S)
        while self.ranks.is_first and store.add(_HEARD, 0) < self.ranks.world_size and running.seconds() < HEARING_S:
            time.sleep(POLL_S)

    def _watch(self, wait: Callable[[threading.Event, Any], None], source: Any) -> None:
        threading.Thread(target=wait, args=(self._is_over, source), name="start", daemon=True).start()

    def _wait_for_signal(self, is_over: threading.Event, reader: int) -> None:
        """Thread: a signal while the run starts. There is nothing to save: it ends as one that was asked to stop."""
        while not is_over.is_set():
            if not select.select([reader], [], [], POLL_S)[0]:
                continue
            number = os.read(reader, 1)[0]
            if number in SIGNALS and not is_over.is_set():
                name = signal.Signals(number).name
                say(f"stopped by {name} before the first step; the same command starts again", prefix="")
                self._exit(ExitCode.REQUEUE)

    def _wait_for_fault(self, is_over: threading.Event, store: Any) -> None:
        """Thread: what another rank could not do, that rank 0 is gone, or that a rank's process stands still."""
        pulse = Pulse(self.ranks, store)
        while not is_over.wait(POLL_S):
            try:
                told = in_time(lambda: self._ask(store, pulse), self.timeout_s)
            except Exception as error:
                if not is_over.is_set():
                    say(_lost(self.ranks.rank, error))
                    self._exit(ExitCode.LOST_RANK)
                return
            if told is not None and not is_over.is_set():
                say(told["line"])
                with suppress(Exception):
                    store.add(_HEARD, 1)
                    self._wait_until_heard(store)
                self._exit(told["code"])

    def _ask(self, store: Any, pulse: Pulse) -> dict[str, Any] | None:
        """The fault that a rank has told of, or that this one finds in the rank that it watches."""
        if pulse.beat() > self.timeout_s:
            line = (
                f"rank {pulse.watched} has stood still for {self.timeout_s:.0f} s while the run starts: stopped, or "
                "its machine is cut off; look at its machine, then start the same command again"
            )
            store.compare_set(_FAULT, "", _as_told(ExitCode.LOST_RANK, line, self.ranks.rank))
        return parse(store.get(_FAULT), "the store") if store.check([_FAULT]) else None

    def _exit(self, code: int) -> NoReturn:
        """End the process from any thread: the main thread may stand where nothing reaches it."""
        try:
            for clean_up in reversed(self._clean_up):
                with suppress(Exception):
                    clean_up()
            sys.stdout.flush()
        finally:
            os._exit(code)


def as_fault(error: BaseException, rank: int) -> tuple[int, str]:
    """This rank's exit code and the line that every rank says, where one could not start for this error."""
    line = user_message(error) if isinstance(error, InputError | AwayError | OSError) else None
    if line is not None:
        return ExitCode.REQUEUE if isinstance(error, AwayError) else ExitCode.INPUT_ERROR, line
    if is_lost_peer(error):
        return ExitCode.LOST_RANK, _lost(rank, error)
    return 1, f"rank {rank} could not start: {type(error).__name__}: {describe(error)}"


def _as_told(code: int, line: str, rank: int) -> str:
    """What lies in the store of a fault."""
    return json.dumps({"code": code, "line": line, "rank": rank})


def _lost(rank: int, error: BaseException) -> str:
    return (
        f"rank {rank}: a rank ended or stands still while the run starts ({describe(error)}); "
        "look at what the others printed, then start the same command again"
    )


def say(line: str, prefix: str = "error: ") -> None:
    """One line on stderr, in one write: ranks may share it."""
    with suppress(OSError):
        sys.stderr.write(f"{prefix}{line}\n")
        sys.stderr.flush()


def identity(words: Sequence[str]) -> str:
    """What all ranks of a start have in common: the command's words, without what launchers add for a rank."""
    return json.dumps([word for word in words if not word.startswith(("--local_rank", "--local-rank"))])


def _forget_pipe() -> None:
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)
