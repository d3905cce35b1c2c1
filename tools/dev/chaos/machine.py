"""The machine that the killed runs have to do with: what clusters, file systems and servers do, in one process each.

    OddMachine            in every rank: a file system without hard links, a wall clock that can be set
    respect_owners        in every rank: directories of others refuse root, too
    broken_server         in this process: shards at an address, two of three answers of each path broken on the wire

Patched are `os.link` and `time.time` as Python code sees them; the kernel's own clock stays.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

CAPABILITY_VERSION = 0x20080522
OVERRIDING = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: with them no directory refuses root."""

ANSWERS = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",  # a chunk without a length
    b"garbage\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\ncut",
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
    b"",
)
NUM_BROKEN = 2
"""Answers that are broken before one is whole; fewer than `data_pipeline.remote` tries."""


@dataclass(frozen=True)
class OddMachine:
    """Call it in a rank; `clock` holds the seconds by which the wall clock was set, see `set_clock`."""

    clock: Path

    def __call__(self) -> None:
        """Take hard links and the true time away from this process."""
        with self.clock.open("rb") as stream:
            offset = mmap.mmap(stream.fileno(), 8, prot=mmap.PROT_READ)
        true_time = time.time
        time.time = lambda: true_time() + struct.unpack("d", offset[:8])[0]
        os.link = partial(_refuse, errno.EPERM)


def set_clock(clock: Path, seconds: float) -> None:
    """Set the wall clock of every rank whose machine has this file, in one write."""
    with clock.open("r+b" if clock.exists() else "wb") as stream:
        stream.write(struct.pack("d", seconds))


def _refuse(number: int, *_: Any) -> None:
    raise OSError(number, os.strerror(number))


def respect_owners() -> None:
    """Call it in a rank that root has started: what belongs to others refuses it from now on, as it does anybody.

    Source: capset(2); the capabilities are this thread's and of threads that it starts.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the upper halves of the three
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for index in range(3):
        sets[index] &= ~OVERRIDING
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


class _Breaking(SimpleHTTPRequestHandler):
    seen: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        """Two broken answers, then a whole one, of each path."""
        self.seen[self.path] += 1
        number = self.seen[self.path]
        with suppress(ConnectionError):  # a rank that was killed
            if number % (NUM_BROKEN + 1) == 0:
                super().do_GET()
            else:
                self.wfile.write(ANSWERS[number % len(ANSWERS)])
                self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing: what is broken is broken on purpose."""


@contextmanager
def broken_server(folder: Path) -> Iterator[str]:
    """Serve a folder so; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Breaking, directory=str(folder)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
