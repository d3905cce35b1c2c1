"""A shard set that lies elsewhere: its index is copied once, its tars as they are needed, into a bounded local cache.

Owns copying, retrying and evicting. Several processes may share a cache: a file lock lets one copy while the others
wait. What arrives is checked by its size here and by checksums where it is read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import InputError

NUM_TRIES = 4
FIRST_WAIT_S = 0.5
TIMEOUT_S = 30
_CHUNK_BYTES = 1 << 20


class RemoteError(InputError):
    """A file that could not be copied."""


def is_remote(path: str) -> bool:
    """Whether a source's path is an address."""
    return "://" in path


def default_cache() -> Path:
    """Where copies lie if a source does not say it."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sightline" / "shards"


@dataclass(frozen=True)
class RemoteSet:
    """A set at `url` whose copies lie in `folder`; tars beyond `max_bytes` are evicted, longest unused first."""

    url: str
    folder: Path
    max_bytes: int

    @classmethod
    def at(cls, url: str, cache: Path, max_bytes: int) -> RemoteSet:
        """The set at an address, in a folder of its own below `cache`."""
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        return cls(url.rstrip("/"), cache / name, max_bytes)

    def refresh(self, meta: str) -> None:
        """Copy the set's description anew; where it is another one than before, all copies are cleared.

        Raises:
            RemoteError: it did not arrive.
        """
        target = self.folder / meta
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")
        with _locked(self.folder / ".refresh.lock"):
            self._copy(f"{self.url}/{meta}", fresh, None)
            if target.exists() and target.read_bytes() != fresh.read_bytes():
                for path in [*self.folder.glob("*.tar"), *target.parent.glob("*.npy")]:
                    path.unlink(missing_ok=True)
            fresh.rename(target)

    def copy(self, name: str, num_bytes: int) -> Path:
        """The local copy of a file of the set, made if it is not there.

        Raises:
            RemoteError: it did not arrive, or not whole, in `NUM_TRIES` tries.
        """
        target = self.folder / name
        with _locked(target.with_name(f".{target.name}.lock")):
            if target.exists():
                os.utime(target)
                return target
            if target.suffix == ".tar":
                self._make_room(num_bytes)
            self._copy(f"{self.url}/{name}", target, num_bytes)
        return target

    def _copy(self, url: str, target: Path, num_bytes: int | None) -> None:
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        reason = ""
        for number in range(NUM_TRIES):
            if number:
                time.sleep(FIRST_WAIT_S * 2 ** (number - 1))
            try:
                _download(url, temporary)
                _check_whole(temporary, num_bytes)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                continue
            temporary.rename(target)
            return
        temporary.unlink(missing_ok=True)
        raise RemoteError(f"{url} cannot be copied after {NUM_TRIES} tries: {reason}")

    def _make_room(self, num_bytes: int) -> None:
        """Evict tars; one that is being read stays readable until it is closed."""
        with _locked(self.folder / ".room.lock"):
            tars = sorted(
                ((path.stat(), path) for path in self.folder.glob("*.tar")), key=lambda pair: pair[0].st_mtime_ns
            )
            total = sum(status.st_size for status, _ in tars)
            for status, path in tars:
                if total + num_bytes <= self.max_bytes:
                    return
                total -= status.st_size
                path.unlink()


def _check_whole(path: Path, num_bytes: int | None) -> None:
    """By its size; a description, whose size nothing tells, by whether it can be read."""
    if num_bytes is None:
        json.loads(path.read_bytes())
    elif path.stat().st_size != num_bytes:
        raise ValueError(f"{path.stat().st_size} of {num_bytes} bytes came")


def _download(url: str, target: Path) -> None:
    if url.startswith(("http://", "https://")):
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as source, target.open("wb") as stream:
            shutil.copyfileobj(source, stream, _CHUNK_BYTES)
        return
    filesystem, path = _s3(url) if url.startswith("s3://") else _other(url)
    filesystem.get_file(path, str(target))


def _s3(url: str) -> tuple[Any, str]:
    """pyarrow's client in fsspec's interface: it comes with pyarrow, where s3fs would bring all of botocore.

    Keys and endpoint are those of the AWS tools: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws, the instance's role.
    """
    from fsspec.implementations.arrow import ArrowFSWrapper  # type: ignore[import-untyped]
    from pyarrow.fs import FileSystem  # type: ignore[import-untyped]

    store, path = FileSystem.from_uri(url)
    return ArrowFSWrapper(store), path


def _other(url: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise RemoteError(f"{url}: {error}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
