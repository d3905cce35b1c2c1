"""Commands of this project as processes that need not import torch, transformers and DeepSpeed once more.

    test ── python() ──> client (a small program) ── words, environment, folder, stdin/out/err ──> server
                              ^                                                                   │ fork
                              └──────────── exit code or signal ──────────── the command's process ┘

`python()` stands for `sys.executable`: what is started with it is a process of its own with its own output and exit
code, forked from one that has the imports done (4 to 7 CPU seconds a command). A signal goes through, and where the
client is killed so is the command. `sys.executable` is the client in there too, so that what a command starts is
warm as well. Where an import would have seen another environment, and for words that are not known, the client becomes
the real interpreter. A test of imports, of start-up or of what Ctrl-C does to a group of processes starts a fresh one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from tests.support.paths import REPOSITORY
from tests.support.patience import wait_until

CLIENT = Path(__file__).with_name("warm_client.py")


@lru_cache(maxsize=1)
def python() -> str:
    """The program that stands for `sys.executable`; beside it lies one that stands for `deepspeed`.

    One server is shared by all processes of a test session. It ends when the last of them has.
    """
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    name = hashlib.sha256(f"{session} {REPOSITORY}".encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"sightline-warm-{name}"
    with one_at_a_time():
        if not _lease(folder):
            _start(folder)
    return str(folder / "python")


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Where leases are taken, and where a server that has none left looks once more before it ends."""
    with CLIENT.open("rb") as file:  # a file that is there anyway: nothing is left behind
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def as_executable() -> Iterator[None]:
    """Code that reads `sys.executable` in this process finds the warm one."""
    before, sys.executable = sys.executable, python()
    try:
        yield
    finally:
        sys.executable = before


_leases: list[socket.socket] = []
"""Open as long as this process lives: so the server knows whom it serves."""


def _lease(folder: Path) -> bool:
    lease = socket.socket(socket.AF_UNIX)
    try:
        lease.connect(str(folder / "socket"))
        lease.sendall(bytes(8))
    except OSError:
        lease.close()
        return False
    _leases.append(lease)
    return True


def _start(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "socket").unlink(missing_ok=True)
    program = f"#!{sys.executable} -IS\n" + CLIENT.read_text(encoding="utf-8")
    for name in ("python", "deepspeed"):
        (folder / name).write_text(program, encoding="utf-8")
        (folder / name).chmod(0o755)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm_server", str(folder)],
            cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip

    def is_there() -> bool:
        assert server.poll() is None, (folder / "log").read_text(encoding="utf-8")
        return _lease(folder)

    wait_until("the warm interpreter listens", is_there)
