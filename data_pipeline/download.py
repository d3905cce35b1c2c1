"""One try to bring a file, or a part of it, from an address: over HTTP, from S3, or by any client that fsspec knows.

Owns how long a copy may take and how large it may become, whatever the server says. Does not own further tries, nor
where copies are kept (`remote`).

    keep_up --> its thread: a client of the address's kind writes a file
            --> this one: looks at the time and at the file's size, and gives up on both
"""

from __future__ import annotations

import math
import queue
import threading
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

from models.common.errors import InputError

TIMEOUT_S = 30
"""Longest wait for an answer's next bytes."""
PATIENCE_S = 60.0
"""How far a copy may fall behind `LEAST_BYTES_PER_S`, in seconds of that rate, before it is given up on."""
LEAST_BYTES_PER_S = 100_000
"""So a server that sends a byte now and then, each in time, is not waited for."""
LOOK_S = 0.2
"""Seconds between two looks at a copy."""
_CHUNK_BYTES = 1 << 20


class RemoteError(InputError):
    """A file that could not be copied."""


class WholeFileError(RemoteError):
    """A server that was asked for a part of a file, and sends files whole."""


def download_in_time(url: str, target: Path, max_bytes: int, start: int | None = None) -> None:
    """Copy an address, or `max_bytes` of it from `start` on, to a file. A thread that is given up on leaves no file.

    Raises:
        TimeoutError: it fell behind by more than `PATIENCE_S`.
        ValueError: more than `max_bytes` came.
        Exception: whatever the client raises.
    """

    def work(given_up: threading.Event) -> None:
        try:
            if start is None:
                _download(url, target, max_bytes, given_up)
            else:
                _download_part(url, target, start, max_bytes)
        finally:
            if given_up.is_set():  # nobody takes what came
                target.unlink(missing_ok=True)

    keep_up(work, target, max_bytes)


def keep_up(work: Callable[[threading.Event], None], target: Path, max_bytes: float = math.inf) -> None:
    """Have a client write a file, and give up on it, which its argument tells it, where it falls behind.

    The client has a thread of its own, since none of them bounds all of its work: names, handshakes and headers that
    come drop by drop are waited for one by one.

    Raises:
        TimeoutError: it fell behind by more than `PATIENCE_S`.
        ValueError: more than `max_bytes` came.
        Exception: whatever the client raises.
    """
    answer: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    given_up = threading.Event()

    def run() -> None:
        try:
            work(given_up)
            answer.put(None)
        except Exception as error:  # of any client; it is raised in the thread that waits
            answer.put(error)

    threading.Thread(target=run, name="download", daemon=True).start()
    left_s, num_bytes = PATIENCE_S, 0
    try:
        while left_s > 0:
            with suppress(queue.Empty):
                fault = answer.get(timeout=LOOK_S)
                if fault is not None:
                    raise fault
                return
            before, num_bytes = num_bytes, _size(target, max_bytes)
            # looks are counted, not read from a clock: the time in which this process is stopped is not the server's
            left_s = min(PATIENCE_S, left_s - LOOK_S + (num_bytes - before) / LEAST_BYTES_PER_S)
    finally:
        given_up.set()
    raise TimeoutError(
        f"{num_bytes} bytes came, for {PATIENCE_S:g} s fewer than {LEAST_BYTES_PER_S} a second, and it was given up on"
    )


def _size(target: Path, max_bytes: float) -> int:
    """The size of a file so far; raises ValueError where it is more than `max_bytes`."""
    num_bytes = target.stat().st_size if target.exists() else 0
    if num_bytes > max_bytes:
        raise ValueError(f"more than {max_bytes} bytes came")
    return num_bytes


def _download(url: str, target: Path, max_bytes: int, given_up: threading.Event) -> None:
    """Copy an address to a file; of a web server no more than `max_bytes` and a chunk, and no more once given up on."""
    if url.startswith(("http://", "https://")):
        num_bytes = 0
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as source, target.open("wb", 0) as stream:
            while num_bytes <= max_bytes and not given_up.is_set() and (block := source.read1(_CHUNK_BYTES)):
                stream.write(block)
                num_bytes += len(block)
        return
    filesystem, path = _filesystem(url)
    filesystem.get_file(path, str(target))


def _download_part(url: str, target: Path, start: int, num_bytes: int) -> None:
    """Copy `num_bytes` of an address from byte `start` on to a file."""
    if url.startswith(("http://", "https://")):
        asked = urllib.request.Request(url, headers={"Range": f"bytes={start}-{start + num_bytes - 1}"})
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as source:
            if source.status != HTTPStatus.PARTIAL_CONTENT:
                raise WholeFileError(f"{url}: its server sends files whole: raise cache_gb, so that they fit")
            target.write_bytes(source.read(num_bytes))
        return
    filesystem, path = _filesystem(url)
    with filesystem.open(path, "rb") as source:
        source.seek(start)
        target.write_bytes(source.read(num_bytes))


def open_remote(url: str) -> IO[bytes]:
    """A file at an address that fsspec knows, read piece by piece; raises what its client raises."""
    filesystem, path = _filesystem(url)
    stream: IO[bytes] = filesystem.open(path, "rb")
    return stream


def _filesystem(url: str) -> tuple[Any, str]:
    return _s3(url) if url.startswith("s3://") else _other(url)


def _s3(url: str) -> tuple[Any, str]:
    """pyarrow's client in fsspec's interface: it needs only pyarrow, while s3fs would need botocore.

    Keys and endpoint are those of the AWS tools: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws, the instance's role.
    """
    from fsspec.implementations.arrow import ArrowFSWrapper  # type: ignore[import-untyped]
    from pyarrow.fs import FileSystem  # type: ignore[import-untyped]

    store, path = FileSystem.from_uri(url)
    return ArrowFSWrapper(store), path


def _other(url: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]

    return fsspec.core.url_to_fs(url)
