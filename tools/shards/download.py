"""One file over HTTP: resumed after an interruption, retried, verified, and complete or absent.

Owns the bytes of one file. `tools.shards.fetch` chooses the files and processes them.

    NAME.part + NAME.part.tag  --Range, If-Range-->  NAME.part  --size, sha256-->  NAME
"""

from __future__ import annotations

import hashlib
import http.client
import ssl
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from data_pipeline.download import keep_up
from models.common.errors import InputError

NUM_TRIES = 5
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
TIMEOUT_S = 30
_CHUNK_BYTES = 1 << 20
_WORTH_RETRYING = frozenset({408, 425, 429, 500, 502, 503, 504})


class BrokenOffError(Exception):
    """A failed try that may succeed when repeated."""


def download(url: str, target: Path, *, num_bytes: int | None, sha256: str | None, progress: bool = False) -> None:
    """Fetch a file to `target`, resuming from `target`.part of an earlier call.

    Waits 1, 2, 4, … seconds between tries; only consecutive tries without new bytes count, and those in which a server
    dripped.

    Raises:
        InputError: a permanent error, too many failed tries, another size or checksum, a full disk.
    """
    part = target.with_name(f"{target.name}.part")
    num_failures, most = 0, _size(part)
    while True:
        try:
            keep_up(lambda given_up: _try_once(url, part, num_bytes, progress, given_up), part)
            break
        except (BrokenOffError, TimeoutError) as error:  # a server that drips always sends some bytes
            least = 0 if isinstance(error, BrokenOffError) else _CHUNK_BYTES
            num_failures = 0 if _size(part) > most + least else num_failures + 1
            most = max(most, _size(part))
            if num_failures >= NUM_TRIES:
                raise InputError(
                    f"{url} broke off {NUM_TRIES} times in a row ({error}); run the command again to resume"
                ) from None
            time.sleep(min(FIRST_WAIT_S * 2**num_failures, LONGEST_WAIT_S))
        except OSError as error:
            raise InputError(f"{part} cannot be written: {error.strerror or error}") from None
    _verify(url, part, num_bytes, sha256)
    _tag_file(part).unlink(missing_ok=True)
    part.rename(target)


def _try_once(url: str, part: Path, num_bytes: int | None, progress: bool, given_up: threading.Event) -> None:
    """Ask for the bytes that are missing and append them; if the server restarts from 0, they are overwritten."""
    start = _size(part)
    if num_bytes is not None and start == num_bytes:
        return
    response = _open(url, part, start)
    if response is None:
        return
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise BrokenOffError("the server answered with another range than was asked for")
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None and length.isdigit() else num_bytes
        _tag_file(part).write_text(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
        _append(response, part, start, total, progress=progress, given_up=given_up)
    if total is not None and _size(part) < total:
        raise BrokenOffError(f"{_size(part)} of {total} bytes came")


def _open(url: str, part: Path, start: int) -> Any:
    """The server's answer to a request for the bytes from `start`; None where there are no more."""
    headers = {"User-Agent": "sightline", "Accept-Encoding": "identity"}
    if start:
        tag = _tag_file(part).read_text() if _tag_file(part).exists() else ""
        headers |= {"Range": f"bytes={start}-"} | ({"If-Range": tag} if tag and not tag.startswith("W/") else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{start}":
            return None
        if error.code == 416:
            part.unlink()
            raise BrokenOffError("what was there did not fit; starting anew") from None
        if error.code in _WORTH_RETRYING:
            raise BrokenOffError(f"{error.code} {error.reason}") from None
        raise InputError(
            f"{url}: the server answers {error.code} {error.reason}; if it moved, name a mirror with --base-url"
        ) from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise BrokenOffError(" ".join(str(getattr(error, "reason", error)).split())) from None


def _append(
    response: Any, part: Path, start: int, total: int | None, *, progress: bool, given_up: threading.Event
) -> None:
    from tqdm import tqdm

    name = part.name.removesuffix(".part")
    with (
        part.open("r+b" if start else "wb") as stream,
        tqdm(total=total, initial=start, desc=name, unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        stream.seek(start)
        while True:
            try:
                chunk = response.read1(_CHUNK_BYTES)
            except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
                raise BrokenOffError(str(error) or type(error).__name__) from None
            if not chunk or given_up.is_set():
                return
            stream.write(chunk)
            stream.flush()  # what came is seen by who looks whether it keeps up
            bar.update(len(chunk))


def _verify(url: str, part: Path, num_bytes: int | None, sha256: str | None) -> None:
    """Check size and checksum; a wrong file is removed, so that the next run starts again."""
    found = "nothing" if _size(part) == 0 else ""
    if num_bytes is not None and _size(part) != num_bytes:
        found = f"{_size(part)} bytes, expected {num_bytes}"
    elif sha256 is not None and (digest := _sha256(part)) != sha256:
        found = f"a file with sha256 {digest}, expected {sha256}"
    if found:
        part.unlink(missing_ok=True)
        raise InputError(f"{url} gave {found}; it was removed: try again, or name another mirror with --base-url")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")
