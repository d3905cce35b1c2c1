"""A shard set at a remote address: its index is copied once, its tars as they are needed, into a bounded local cache.

Owns copying, retrying and evicting, and whom a failure is blamed on: a file, where the set's meta.json still comes, or
a server that is away, which is waited for and never costs a sample. One try is `download`'s. Several processes may
share a cache: a file lock lets one copy while the others wait. Copies are checked by size here, and by checksum where
they are read.

Where the tars that are read at once do not fit the cache, a sample's part of one is read instead of the whole (`read`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.download import RemoteError, WholeFileError, download_in_time
from data_pipeline.index_meta import META_FILE
from models.common.documents import MAX_BYTES, parse
from models.common.errors import DISK_FAULTS, AwayError, InputError, single_line, user_message
from models.common.files import locked, new_file, touch
from models.common.node import first_on_node
from models.common.transport import is_final

logger = logging.getLogger(__name__)

NUM_TRIES = 4
"""Of a file that does not come while its server answers, and of a set that has never come."""
AWAY_LIMIT_MINUTES = 10.0
"""How long a server may be away; less than guard.rank_timeout_s, by default."""
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
MOST_TRY_S = 120.0
"""What a try counts for at most: a suspended job's did not take as long."""


def is_remote(path: str) -> bool:
    """Whether a source's path is an address."""
    return "://" in path


def default_cache() -> Path:
    """The cache directory for sources that do not name one."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sightline" / "shards"


@dataclass(frozen=True)
class RemoteSet:
    """A set at `url` with copies in `folder`; beyond `max_bytes` the least recently used tars are evicted."""

    url: str
    folder: Path
    max_bytes: int

    @classmethod
    def at(cls, url: str, cache: Path, max_bytes: int) -> RemoteSet:
        """The set at an address, in a folder of its own below `cache`."""
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        return cls(url.rstrip("/"), cache / name, max_bytes)

    def refresh(self, meta: str) -> None:
        """Copy the set's meta.json again; where it changed, all copies of tars and arrays are removed.

        Of the ranks of one machine one does it for all in a start.

        Raises:
            RemoteError: the copy failed; the address may be wrong.
            AwayError: it has been here before, and its server is away.
        """
        target = self.folder / meta
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}.new")
        with locked(self.folder / ".refresh.lock"), first_on_node(f"{self.url} {self.folder}") as is_first:
            is_known = target.exists()
            if is_known and not is_first:
                return
            self._copy(meta, fresh, None, lambda error: not is_known or is_final(error))
            if target.exists() and target.read_bytes() != fresh.read_bytes():
                for path in [*self.folder.glob("*.tar"), *target.parent.glob("*.npy")]:
                    path.unlink(missing_ok=True)
            fresh.rename(target)

    def copy(self, name: str, num_bytes: int) -> Path:
        """The local copy of a file of the set; it is downloaded where it is absent.

        Raises:
            RemoteError: the copy failed or was incomplete in `NUM_TRIES` tries, while the server answered.
            AwayError: the server is away, or this machine's disk fails.
        """
        target, begun_s = self.folder / name, time.monotonic()
        with locked(target.with_name(f".{target.name}.lock")):
            if target.exists():
                touch(target)
                return target
            if target.suffix == ".tar":
                self._make_room(num_bytes)
            self._copy(name, target, num_bytes, lambda _: self._answers(), time.monotonic() - begun_s)
        return target

    def read(self, name: str, start: int, num_bytes: int) -> bytes:
        """A part of a file of the set, which is not kept.

        Raises:
            WholeFileError: the server sends files whole.
            RemoteError: as `copy`, and AwayError likewise.
        """
        if num_bytes > self.max_bytes:
            raise RemoteError(
                f"{self.url}/{name}: {num_bytes} bytes from byte {start} are more than the cache may hold"
            )
        part = self.folder / f".{os.getpid()}.{threading.get_ident()}.part"

        def ask() -> None:
            download_in_time(f"{self.url}/{name}", part, num_bytes, start)
            _check_whole(part, num_bytes)

        try:
            self._insist(name, part, ask, lambda _: self._answers())
            return part.read_bytes()
        finally:
            part.unlink(missing_ok=True)

    def _copy(
        self,
        name: str,
        target: Path,
        num_bytes: int | None,
        is_at_fault: Callable[[Exception], bool],
        waited_s: float = 0.0,
    ) -> None:
        """Copy a file of the set, by as many tries as it takes."""

        def copy_once() -> None:
            with new_file(target) as temporary:
                download_in_time(f"{self.url}/{name}", temporary, MAX_BYTES if num_bytes is None else num_bytes)
                _check_whole(temporary, num_bytes)

        self._insist(name, target, copy_once, is_at_fault, waited_s)

    def _insist(
        self,
        name: str,
        target: Path,
        work: Callable[[], None],
        is_at_fault: Callable[[Exception], bool],
        waited_s: float = 0.0,
    ) -> None:
        """Do what asks for a file of the set as often as it takes.

        Args:
            target: where it comes to lie.
            is_at_fault: whether the file, and not a server that is away, is to blame for an error.
            waited_s: how long another process has tried already.
        """
        url, num_faults, reason = f"{self.url}/{name}", 0, ""
        for number in _tries(waited_s):
            if number == NUM_TRIES:
                logger.warning(f"{url}: {reason}; waiting up to {AWAY_LIMIT_MINUTES:.0f} minutes for its server")
            try:
                work()
                return
            except WholeFileError:
                raise
            except Exception as error:
                reason = single_line(error)
                if isinstance(error, OSError) and error.errno in DISK_FAULTS and error.filename == str(target):
                    raise AwayError(f"the cache of {self.url}: {user_message(error)}") from error
                if is_at_fault(error):
                    num_faults += 1
                    if is_final(error):
                        raise RemoteError(f"{url} cannot be copied: {reason}") from error
                    if num_faults == NUM_TRIES:
                        raise RemoteError(f"{url} cannot be copied after {NUM_TRIES} tries: {reason}") from error
        raise AwayError(
            f"{url} has been away for {AWAY_LIMIT_MINUTES:.0f} minutes ({reason}); start the same command again when"
            " its server answers"
        )

    def _answers(self) -> bool:
        """Whether the set's server is there: a file that it has sent before still comes."""
        probe = self.folder / f".{os.getpid()}.{threading.get_ident()}.probe"
        try:
            download_in_time(f"{self.url}/{META_FILE}", probe, MAX_BYTES)
            _check_whole(probe, None)
        except Exception:  # of any client; how it is away is said by the file that did not come
            return False
        finally:
            probe.unlink(missing_ok=True)
        return True

    def _make_room(self, num_bytes: int) -> None:
        """Evict tars; one that is being read stays readable until it is closed."""
        with locked(self.folder / ".room.lock"):
            tars = sorted(
                ((path.stat(), path) for path in self.folder.glob("*.tar")), key=lambda pair: pair[0].st_mtime_ns
            )
            total = sum(status.st_size for status, _ in tars)
            for status, path in tars:
                if total + num_bytes <= self.max_bytes:
                    return
                total -= status.st_size
                path.unlink()


def _tries(waited_s: float) -> Iterator[int]:
    """Numbers of tries: the first at once, others after growing pauses, until the limit for a server that is away."""
    number, pause_s, limit_s = 0, FIRST_WAIT_S, 60 * AWAY_LIMIT_MINUTES
    while True:
        begun_s = time.monotonic()
        yield number
        if waited_s >= limit_s:
            return
        number, pause_s = number + 1, min(2 * pause_s, LONGEST_WAIT_S) if number else pause_s
        time.sleep(pause_s)
        waited_s += min(time.monotonic() - begun_s, pause_s + MOST_TRY_S)


def _check_whole(path: Path, num_bytes: int | None) -> None:
    """Check the size; for meta.json, whose size is not known, check that it can be parsed."""
    if num_bytes is None:
        try:
            parse(path.read_bytes(), "the answer")
        except InputError as error:  # cut short perhaps, so it is asked for again
            raise ValueError(str(error)) from None
    elif path.stat().st_size != num_bytes:
        raise ValueError(f"{path.stat().st_size} of {num_bytes} bytes came")
