"""One writer for one run directory: RUN/lock.json names it, and a writer that has lost the lock stops.

    acquired by the first rank -> kept fresh by a thread -> checked before anything is committed -> released last

A lock left behind is recognised: its process is gone (same machine), its job is this job started again (Slurm keeps the
id when it requeues), or nobody has touched it for `STALE_S`. The next holder writes another token; so a writer that was
disconnected and returns finds a token that is not its own, and stops before it commits anything.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from models.common.documents import check, parse, understanding
from models.common.errors import InputError, single_line, user_message
from models.common.exit_codes import ExitCode
from models.common.files import create, touch
from trainer.distributed.context import DistributedContext
from trainer.distributed.running_time import RunningTime

logger = logging.getLogger(__name__)

REFRESH_S = 10.0
STALE_S = 180.0
"""Well above what network file systems cache a file's time for (60 s by default under NFS)."""

NUM_REFRESHES_WAITED = 2.5
"""How long a lock of another machine that looks old is watched before it is taken over."""

LOOK_S = 0.1
NUM_LOOKS = 20
"""At a lock that is empty."""

NUM_ATTEMPTS = 3
"""To create the lock file: after each failed one a stale lock is removed, or another start has won."""


@dataclass(frozen=True)
class Holder:
    """The content of lock.json: on its machine shows whether the writer is alive, elsewhere which job it was."""

    token: str
    host: str
    namespace: str
    """Namespace of process ids: a pid of another container has no meaning here."""
    pid: int
    started: str
    """The process's start time in the kernel's ticks, since pids are used again."""
    job: str
    """Slurm's job id, or "" outside Slurm."""
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        """This process with a new token."""
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
        """Whether this holder has surely ended, as the process `seen_by` can tell.

        Args:
            age_s: seconds since the lock file was last touched, by the file system's clock.
            seen_by: the process that wants the lock.
        """
        if (self.host, self.namespace) == (seen_by.host, seen_by.namespace):
            return _start_time(self.pid) != self.started
        return (self.job != "" and self.job == seen_by.job) or age_s > STALE_S


class RunLock:
    """The right to write into a run directory; `acquire` takes it."""

    def __init__(self, file: Path, holder: Holder, replaced: Holder | None = None) -> None:
        self._file = file
        self.holder = holder
        self.replaced = replaced
        """The holder whose stale lock was taken over."""
        self._released = threading.Event()

    @classmethod
    def acquire(cls, run: Path) -> RunLock:
        """Take the lock of a run directory, which is made where it is missing, and keep it fresh until `release`.

        Raises:
            InputError: a living process holds it, or lock.json is not a lock.
        """
        run.mkdir(parents=True, exist_ok=True)
        file, holder = run / "lock.json", Holder.this_process()
        lock = cls(file, holder, _create(file, holder))
        threading.Thread(target=lock._keep_fresh, name="run-lock", daemon=True).start()
        return lock

    def is_ours(self) -> bool:
        """Whether lock.json still names this process; True where the file system does not answer."""
        try:
            return bool(_read(self._file).token == self.holder.token)
        except FileNotFoundError:
            return False
        except (OSError, InputError):
            return True

    def check(self) -> None:
        """End the process with `ExitCode.FENCED` if another start has the lock; called before anything is committed."""
        if not self.is_ours():
            self._exit_fenced()

    def release(self) -> None:
        """Release the directory; only the first call has an effect.

        Called last, when no thread of this process writes or deletes in the directory any more.
        """
        if self._released.is_set():
            return
        self._released.set()
        try:
            if self.is_ours():
                self._file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning(f"{self._file}: {error.strerror}; it stays behind, and the next start takes it over")

    def _keep_fresh(self) -> None:
        while not self._released.wait(REFRESH_S):
            if not self.is_ours() and not self._released.is_set():
                self._exit_fenced()
            try:
                touch(self._file)
            except OSError:  # a file system that is unavailable for a while; a successor would have changed the token
                continue

    def _exit_fenced(self) -> NoReturn:
        """Exit without clean-up: the files it would write now belong to the other start."""
        logger.error(f"{self._file}: another start has taken this run over; this process stops")
        os._exit(ExitCode.FENCED)


def take_lock(run: Path, ranks: DistributedContext) -> RunLock | None:
    """Acquire the run directory for all ranks; a collective.

    Returns:
        The lock on the first rank, None on the others.

    Raises:
        InputError: on every rank, where another process has the directory or it cannot be written.
    """
    lock, fault = None, ""
    if ranks.is_first:
        try:
            lock = RunLock.acquire(run)
        except (InputError, OSError) as error:
            fault = user_message(error) or f"{run}: {single_line(error)}"
    fault = ranks.gather(fault)[0]
    if fault:
        raise InputError(fault)
    if lock is not None and lock.replaced is not None:
        gone = lock.replaced
        logger.info(f"{run}: took over from process {gone.pid} on {gone.host}, which has ended")
    return lock


def _create(file: Path, holder: Holder) -> Holder | None:
    """Write the lock file if there is none or a stale one; the holder of the stale one."""
    content = json.dumps(asdict(holder)).encode()
    replaced = None
    for _ in range(NUM_ATTEMPTS):
        try:
            create(file, content)
            return replaced
        except FileExistsError:
            replaced = _remove_stale(file, holder) or replaced
    raise InputError(f"{file}: several processes are starting this run at once; start one")


def _remove_stale(file: Path, holder: Holder) -> Holder | None:
    """Remove a lock whose holder is gone, and return that holder; None where another process removed it meanwhile."""
    try:
        found = _read(file)
        age_s = STALE_S + 1 if _is_still(file, found, holder) else 0.0
    except FileNotFoundError:
        return None
    if not found.is_gone(age_s, holder):
        job = f", job {found.job}" if found.job else ""
        raise InputError(
            f"{file.parent}: process {found.pid} on {found.host}{job} has been writing here since "
            f"{found.since}; stop it first, or give this run another directory (run=DIR)"
        )
    aside = file.with_name(f".lock.stale.{holder.token}")
    try:
        file.rename(aside)  # of several processes that try at once, one succeeds
    except FileNotFoundError:
        return None
    try:
        if _read(aside).token == found.token:
            return found
        # Between reading and renaming another start took over: what was moved is its new lock, so put it back. If a
        # third start was faster than this, the second finds the third's token, and stops before it commits anything.
        with suppress(FileExistsError):
            create(file, aside.read_bytes())
        return None
    finally:
        aside.unlink()


def _is_still(file: Path, found: Holder, holder: Holder) -> bool:
    """Whether nobody has touched a lock of another machine for `STALE_S`, and nobody does while this process looks.

    Its age is the difference of two times of the file system: clocks of machines differ. A clock may leap, too, and
    make a lock look old that a living process refreshes; so an old one is looked at for longer than a refresh takes.
    """
    if (found.host, found.namespace) == (holder.host, holder.namespace):
        return False  # whether it lives can be seen
    touched_s = file.stat().st_mtime
    if found.is_gone(0.0, holder) or _now_of(file.parent, holder) - touched_s <= STALE_S:
        return False
    running = RunningTime(2 * LOOK_S)
    while running.seconds() < NUM_REFRESHES_WAITED * REFRESH_S:
        time.sleep(LOOK_S)
        with file.open("rb") as stream:  # a network file system asks its server for the times of what is opened
            if os.fstat(stream.fileno()).st_mtime != touched_s:
                return False
    return True


def _now_of(directory: Path, holder: Holder) -> float:
    """The present by the file system's clock."""
    probe = directory / f".lock.{holder.token}"
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _read(file: Path) -> Holder:
    """What a lock says; one that is being written on a file system without hard links is empty for a moment."""
    for _ in range(NUM_LOOKS):
        text = file.read_text(encoding="utf-8")
        if text:
            break
        time.sleep(LOOK_S)
    advice = "not a lock; remove it if no run is on here"
    value = check(parse(text, file, advice), _VALUES, file, advice)
    with understanding(file, advice):
        return Holder(**{**value, "pid": int(value["pid"])})


_VALUES: Any = dict[str, str | int]


def _start_time(pid: int) -> str:
    """The kernel's start time of a process, or "" where there is none or it is dead and not yet reaped.

    Source: proc(5), /proc/PID/stat, fields 3 (state) and 22 (starttime); the name before them may hold spaces.
    """
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
