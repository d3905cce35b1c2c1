"""Bytes of a set's tars by name and offset: from open files, from copies of remote tars, or from the server itself.

    local set                                   an open file for each tar that is being read
    remote, its tars fit the cache              copied whole, then as a local set
    remote, more tars at once than fit          a request for each sample, nothing is kept

Owns how many files are open, and whom a failure is blamed on. Does not own where samples are (`data_pipeline.index`).
"""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.download import WholeFileError
from data_pipeline.index_meta import META_FILE
from data_pipeline.remote import RemoteSet
from models.common.errors import AwayError, InputError

logger = logging.getLogger(__name__)

LEAST_OPEN = 64
SPARE_FILES = 256
"""Files that a process may open beside tars: libraries, sockets, checkpoints."""


class DamagedSampleError(InputError):
    """The bytes on disk are not those that were indexed."""


class TarBytes:
    """Reads the tars of one set.

    Args:
        folder: of the tars, or for copies of a remote set's.
        sizes: of the tars in bytes, by name.
    """

    def __init__(self, folder: Path, remote: RemoteSet | None, sizes: Mapping[str, int]) -> None:
        self._folder, self._remote, self._sizes = folder, remote, sizes
        self._max_open = LEAST_OPEN
        self.files: dict[str, int] = {}
        """Open tars, the one that was read longest ago first."""
        self.reads_parts = False
        """Whether a sample's part of a remote tar is read instead of copying the whole."""

    def __del__(self) -> None:
        for descriptor in getattr(self, "files", {}).values():
            os.close(descriptor)

    def expect(self, num_tars: int, num_ranks: int) -> None:
        """Prepare for reading so many tars in turn: keep them open, as far as the system lets this process.

        Where a remote set's cache cannot hold them for all ranks of a machine, a tar would be copied again for every
        few samples, so samples are read one by one.

        Args:
            num_ranks: how many share the cache.
        """
        wanted = max(LEAST_OPEN, num_tars)
        self._max_open = min(wanted, max(LEAST_OPEN, _most_files(wanted) - SPARE_FILES))
        if self._remote is not None and self._sizes:
            mean_bytes = sum(self._sizes.values()) // len(self._sizes)
            self.reads_parts = num_tars * num_ranks * mean_bytes > self._remote.max_bytes

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of a tar; fewer where it ends too early.

        Raises:
            DamagedSampleError: the tar cannot be read.
            RemoteError: it cannot be copied.
            AwayError: the whole set is gone.
        """
        if self._remote is not None and self.reads_parts and not (self._folder / shard).exists():
            try:
                return self._remote.read(shard, offset, length)
            except WholeFileError as error:
                logger.warning(f"{error}; until then they are copied whole, again and again")
                self.reads_parts = False
        descriptor = self._descriptor(shard)
        try:
            return os.pread(descriptor, length, offset)
        except OSError as error:
            raise self._blamed(f"{shard}: cannot be read ({error.strerror})") from None

    def copy(self, shard: str) -> None:
        """Copy a remote tar into the cache; does nothing for a local set, or where parts of tars are read.

        Raises:
            RemoteError: the copy failed.
        """
        if self._remote is not None and not self.reads_parts:
            self._remote.copy(shard, self._sizes[shard])

    def _descriptor(self, shard: str) -> int:
        """An open file of the shard; beyond a limit the one that was read longest ago is closed."""
        if shard in self.files:
            self.files[shard] = self.files.pop(shard)
            return self.files[shard]
        while len(self.files) >= self._max_open:
            os.close(self.files.pop(next(iter(self.files))))
        try:
            self.copy(shard)
        except OSError as error:
            raise AwayError(f"{self._folder}: {error.strerror}; the cache must be writable") from None
        try:
            self.files[shard] = os.open(self._folder / shard, os.O_RDONLY)
        except OSError as error:
            raise self._blamed(f"{shard}: cannot be opened ({error.strerror})") from None
        return self.files[shard]

    def _blamed(self, reason: str) -> Exception:
        """The error for a tar that the disk does not give: a sample's, unless the whole set is gone."""
        try:
            (self._folder / META_FILE).read_bytes()
        except OSError as error:
            return AwayError(
                f"{self._folder}: {error.strerror}, though the set was there; start the same command again when it is"
            )
        return DamagedSampleError(reason)


def _most_files(wanted: int) -> int:
    """How many files this process may have open; raised where that is fewer than wanted and the system allows more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return needed
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed
