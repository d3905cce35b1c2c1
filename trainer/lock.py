"""One writer for one run directory: RUN/lock.json says who it is, and a writer that lost it stops.

    taken by the first rank only -> kept fresh by a thread -> looked at before anything is committed -> released

A lock left behind is recognised: its process is gone (same machine), its job is this job started again (Slurm requeues
keep the id), or nobody has touched it for `STALE_S`. Its successor takes another token; so a writer that was cut off
and comes back finds a token that is not its own, and stops before it commits anything.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from models.errors import InputError
from trainer.ranks import Ranks

EXIT_FENCED = 77
"""Another start has taken the run directory over; whatever this process holds is not written."""

REFRESH_S = 10.0
STALE_S = 180.0
"""Well above what network file systems cache a file's time for (60 s by default under NFS)."""


@dataclass(frozen=True)
class Holder:
    """Who writes: enough to tell on the same machine whether it still lives, and elsewhere which job it was."""

    token: str
    host: str
    namespace: str
    """Of process ids: a pid of another container says nothing here."""
    pid: int
    started: str
    """The process's start time in the kernel's ticks, since pids are used again."""
    job: str
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        """A new token for this process."""
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            namespace=_pid_namespace(),
            pid=os.getpid(),
            started=_start_time(os.getpid()),
            job=os.environ.get("SLURM_JOB_ID", ""),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def is_gone(self, age_s: float, seen_by: Holder) -> bool:
        """Whether the holder has surely ended, as another process sees it; `age_s` since its last sign of life."""
        if (self.host, self.namespace) == (seen_by.host, seen_by.namespace):
            return _start_time(self.pid) != self.started
        return (self.job != "" and self.job == seen_by.job) or age_s > STALE_S


class RunLock:
    """The right to write into a run directory."""

    def __init__(self, run: Path) -> None:
        """Take it; InputError where a living process holds it."""
        run.mkdir(parents=True, exist_ok=True)
        self._file = run / "lock.json"
        self.holder = Holder.this_process()
        self.replaced: Holder | None = None
        """Whose stale lock was taken over."""
        self._take()
        self._released = threading.Event()
        threading.Thread(target=self._keep_fresh, name="run-lock", daemon=True).start()

    def _take(self) -> None:
        own = self._file.with_name(f".lock.{self.holder.token}")
        own.write_text(json.dumps(asdict(self.holder)), encoding="utf-8")
        try:
            for _ in range(3):
                try:
                    os.link(own, self._file)  # atomic, and fails where the file is there
                    return
                except FileExistsError:
                    self._clear_stale(now_s=own.stat().st_mtime)
        finally:
            own.unlink()
        raise InputError(f"{self._file}: several processes are starting this run at once; start one")

    def _clear_stale(self, now_s: float) -> None:
        """Remove a lock whose holder is gone. Times are the file system's own: clocks of machines differ."""
        try:
            age_s = now_s - self._file.stat().st_mtime
            found = Holder(**json.loads(self._file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return
        except (ValueError, TypeError) as error:
            raise InputError(f"{self._file}: not a lock ({error}); remove it if no run is on here") from error
        if not found.is_gone(age_s, self.holder):
            job = f", job {found.job}" if found.job else ""
            raise InputError(
                f"{self._file.parent}: process {found.pid} on {found.host}{job} has been writing here since "
                f"{found.since}; stop it first, or give this run another directory (run=DIR)"
            )
        aside = self._file.with_name(f".lock.stale.{self.holder.token}")
        try:
            self._file.rename(aside)  # one of several that try at once succeeds
        except FileNotFoundError:
            return
        aside.unlink()
        self.replaced = found

    def is_ours(self) -> bool:
        """Whether the lock still names this process; True where the file system does not answer."""
        try:
            return bool(json.loads(self._file.read_text(encoding="utf-8"))["token"] == self.holder.token)
        except FileNotFoundError:
            return False
        except (OSError, ValueError):
            return True

    def check(self) -> None:
        """End the process where another has taken over: called before anything is committed."""
        if not self.is_ours():
            self._stop()

    def release(self) -> None:
        """Give it back."""
        self._released.set()
        if self.is_ours():
            self._file.unlink(missing_ok=True)

    def _keep_fresh(self) -> None:
        while not self._released.wait(REFRESH_S):
            if not self.is_ours() and not self._released.is_set():
                self._stop()
            try:
                os.utime(self._file)
            except OSError:
                continue

    def _stop(self) -> NoReturn:
        print(f"error: {self._file}: another start has taken this run over; this process stops", flush=True)
        os._exit(EXIT_FENCED)


def _start_time(pid: int) -> str:
    """The kernel's start time of a process, or "" where there is none or it is dead and not yet reaped."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def take_lock(run: Path, ranks: Ranks) -> RunLock | None:
    """The first rank takes the run directory for all; InputError on every rank where another process has it."""
    lock, fault = None, ""
    if ranks.is_first:
        try:
            lock = RunLock(run)
        except InputError as error:
            fault = str(error)
    fault = ranks.gather(fault)[0]
    if fault:
        raise InputError(fault)
    if lock is not None and lock.replaced is not None:
        gone = lock.replaced
        print(f"{run}: took over from process {gone.pid} on {gone.host}, which has ended", flush=True)
    return lock
