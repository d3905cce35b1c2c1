"""Whether every rank still moves, and which one does not.

    main thread: mark("forward") ...      watching thread: RUN/STAGE/ranks/00001.json, every few seconds
                                           own mark too old -> read the others' -> say who -> stacks -> leave

A collective waits for ever for a rank that was stopped, and fails without a name for one that died. Each rank writes
where it is and that it lives; once one has not moved for `timeout_s`, it reads what the others wrote and says who holds
them up. Nothing here communicates: it must work when nothing else does.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from models.files import write_text
from trainer.interrupt import EXIT_LOST_RANK
from trainer.ranks import Ranks

MAX_INTERVAL_S = 5.0


@dataclass(frozen=True)
class Sign:
    """A rank's last sign of life, in Unix seconds of its own machine."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since_s: float
    """When it came to this phase."""
    written_s: float

    @property
    def who(self) -> str:
        """The rank as a person looks for it."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"


class Watch:
    """Writes this rank's signs of life, and ends the process when the run stands still."""

    def __init__(self, directory: Path, ranks: Ranks, timeout_s: float) -> None:
        self._directory, self._ranks, self._timeout_s = directory, ranks, timeout_s
        self._interval_s = min(MAX_INTERVAL_S, timeout_s / 5)
        self._mark = (0, "starting", time.time())
        self._done = threading.Event()
        directory.mkdir(parents=True, exist_ok=True)
        self._write()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def mark(self, phase: str, step: int) -> None:
        """The main thread is at this phase of this step."""
        self._mark = (step, phase, time.time())

    def close(self) -> None:
        """The run is over; nobody is missed any more."""
        self._done.set()
        self._mark = (self._mark[0], "ended", time.time())
        self._write()

    def leave_for_lost_rank(self, reason: str) -> NoReturn:
        """A collective failed: end the process, naming the ranks that give no sign of life."""
        time.sleep(self._interval_s)  # a process that is dying has time to be gone
        found = holdup(self._signs(), self._ranks.world_size, self._interval_s)
        print(
            f"error: rank {self._ranks.rank}: {found} ({reason.splitlines()[0][:200]}); the last checkpoint stands, "
            "start the same command again",
            flush=True,
        )
        os._exit(EXIT_LOST_RANK)

    def _run(self) -> None:
        while not self._done.wait(self._interval_s):
            self._write()
            step, phase, since_s = self._mark
            if time.time() - since_s > self._timeout_s and not self._done.is_set():
                self._leave(step, phase)

    def _leave(self, step: int, phase: str) -> None:
        found = holdup(self._signs(), self._ranks.world_size, self._interval_s)
        stacks = self._directory / f"{self._ranks.rank:05d}.stacks.txt"
        print(
            f"error: rank {self._ranks.rank} has been at {phase} of step {step} for {self._timeout_s:.0f} s: {found};"
            f" stacks in {stacks}; the last checkpoint stands, start the same command again",
            flush=True,
        )
        with stacks.open("w", encoding="utf-8") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        os._exit(EXIT_LOST_RANK)

    def _write(self) -> None:
        step, phase, since_s = self._mark
        sign = Sign(self._ranks.rank, socket.gethostname(), os.getpid(), step, phase, since_s, time.time())
        try:
            write_text(self._directory / f"{sign.rank:05d}.json", json.dumps(asdict(sign)))
        except OSError:  # a full disk is the checkpoint's to tell
            return

    def _signs(self) -> list[Sign]:
        signs = []
        for rank in range(self._ranks.world_size):
            try:
                signs.append(Sign(**json.loads((self._directory / f"{rank:05d}.json").read_text(encoding="utf-8"))))
            except (OSError, ValueError, TypeError):
                continue
        return signs


def leave_at_start(ranks: Ranks, reason: str) -> NoReturn:
    """A collective failed before the ranks watched each other: end the process; the lost one told why, if it could."""
    print(
        f"error: rank {ranks.rank}: another rank ended while the run was starting ({reason.splitlines()[0][:200]}); "
        "look at what the others printed, then start the same command again",
        flush=True,
    )
    os._exit(EXIT_LOST_RANK)


def holdup(signs: list[Sign], world_size: int, interval_s: float) -> str:
    """Who holds a run up: ranks without a sign of life; else those that are behind; else nobody alone.

    The newest sign is the present, so that machines' clocks need agree to a few intervals only.
    """
    absent = sorted(set(range(world_size)) - {sign.rank for sign in signs})
    if absent:
        return f"rank {', '.join(map(str, absent))} never gave a sign of life"
    now_s = max(sign.written_s for sign in signs)
    silent = [sign for sign in signs if now_s - sign.written_s > 4 * interval_s or _is_dead(sign)]
    if silent:
        named = ", ".join(f"{sign.who} silent for {now_s - sign.written_s:.0f} s" for sign in silent)
        return f"{named}: killed, stopped, or its machine is cut off"
    last_step = max(sign.step for sign in signs)
    behind = [sign for sign in signs if sign.step < last_step] or [
        sign for sign in signs if sign.phase != _commonest(signs)
    ]
    if behind:
        named = ", ".join(
            f"{sign.who} at {sign.phase} of step {sign.step} for {now_s - sign.since_s:.0f} s" for sign in behind
        )
        return f"the others wait for {named}"
    return f"all ranks are at {signs[0].phase} of step {last_step}: the network between them, or a collective"


def _commonest(signs: list[Sign]) -> str:
    phases = [sign.phase for sign in signs]
    return max(phases, key=phases.count)


def _is_dead(sign: Sign) -> bool:
    """Whether the process is gone, where that can be seen: on the same machine."""
    return sign.host == socket.gethostname() and not Path(f"/proc/{sign.pid}").exists()
