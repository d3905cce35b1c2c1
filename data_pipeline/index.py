"""A shard set on disk: a directory of tars and, in `index/`, where every member of every sample lies.

Owns the index's layout and reading samples by offset with their checksum. Does not own building it
(`data_pipeline.index_build`) nor what the bytes mean (`data_pipeline.record`).

    SET/*.tar
    SET/index/meta.json             version, fingerprint, extensions, array_bytes,
                                    shards [{name, num_bytes, num_samples}]
    SET/index/samples.npy           [N+1] first member, begin of the key in keys.npy          N samples, M members
    SET/index/members.npy           [M]   offset, size, crc32, extension's number, width, height
    SET/index/keys.npy              [..]  keys, UTF-8, end to end
    SET/quarantine.jsonl            what was left out, if anything: shard, key, reason

The arrays are memory-mapped: opening costs the same for a thousand samples as for ten million. A sample's rows are
taken out as one slice, and its members are read with one call: that is what makes reading fast.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from data_pipeline.remote import RemoteSet
from models.errors import InputError

INDEX_VERSION = 1
INDEX_FOLDER = "index"
META_FILE = f"{INDEX_FOLDER}/meta.json"
QUARANTINE_FILE = "quarantine.jsonl"
SAMPLE_FIELDS = [("first_member", "<u8"), ("key_start", "<u8")]
MEMBER_FIELDS = [
    ("offset", "<u8"),
    ("size", "<u4"),
    ("crc32", "<u4"),
    ("extension", "<u2"),
    ("width", "<u4"),
    ("height", "<u4"),
]
ARRAYS: Mapping[str, np.dtype[Any]] = {
    "samples": np.dtype(SAMPLE_FIELDS),
    "members": np.dtype(MEMBER_FIELDS),
    "keys": np.dtype("|u1"),
}
_MAX_OPEN_SHARDS = 64
_MAX_GAP_BYTES = 16 * 1024
"""Members of a sample with less than this between them are read with one call."""


class DamagedSampleError(InputError):
    """The bytes on disk are not those that were indexed."""


class Member(NamedTuple):
    """One file of a sample. `width` and `height` are 0 where it is not a picture."""

    extension: str
    offset: int
    size: int
    crc32: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """Where one sample lies."""

    shard: str
    key: str
    members: tuple[Member, ...]


class ShardIndex:
    """An opened shard set. Cheap to pickle: a worker opens it again by its path.

    Args:
        folder: where the set lies, or where copies of a remote one are to lie.
        remote: where its files come from if they are not there.
        selection: the tars that count, in this order; None: all of them, in the index's order.

    Raises:
        InputError: no index, another version, an index that does not fit the tars beside it, or a tar selected that
            the index lacks.
    """

    def __init__(
        self, folder: Path | str, remote: RemoteSet | None = None, selection: tuple[str, ...] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.remote, self._selection = remote, selection
        meta = _read_meta(self.folder)
        all_names: list[str] = [shard["name"] for shard in meta["shards"]]
        all_sizes: list[int] = [shard["num_samples"] for shard in meta["shards"]]
        chosen = _places(self.folder, all_names, selection)
        self.shard_names: list[str] = [all_names[place] for place in chosen]
        self.shard_sizes: list[int] = [all_sizes[place] for place in chosen]
        self.fingerprint: str = _selected(meta["fingerprint"], self.shard_names, all_names)
        if remote is not None:
            for name, num_bytes in meta["array_bytes"].items():
                remote.copy(f"{INDEX_FOLDER}/{name}.npy", num_bytes)
        self._shard_bytes: dict[str, int] = {shard["name"]: shard["num_bytes"] for shard in meta["shards"]}
        self._extensions: list[str] = meta["extensions"]
        self._shard_ends: list[int] = np.cumsum(self.shard_sizes, dtype=np.int64).tolist()
        all_ends = np.cumsum(all_sizes, dtype=np.int64)
        self._shifts: list[int] = (all_ends[chosen] - np.array(self._shard_ends, dtype=np.int64)).tolist()
        """From a sample's number to its row, by shard: all 0 where every tar is selected."""
        arrays = {name: _map_array(self.folder, name, dtype) for name, dtype in ARRAYS.items()}
        self._samples, self._members, self._keys = arrays["samples"], arrays["members"], arrays["keys"]
        self._files: dict[str, int] = {}
        if len(self._samples) != sum(all_sizes) + 1:
            raise InputError(f"{self.folder}: the index does not fit its meta.json; run `tools.shards index` again")

    def __len__(self) -> int:
        return int(self._shard_ends[-1]) if self._shard_ends else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex, (self.folder, self.remote, self._selection)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def shard_of(self, sample: int) -> str:
        """Name of the tar that holds a sample."""
        return self.shard_names[bisect_right(self._shard_ends, sample)]

    def key_of(self, sample: int) -> str:
        """A sample's key: its members' common name."""
        row = self._row(sample)
        (_, start), (_, end) = self._samples[row : row + 2].tolist()
        return self._keys[start:end].tobytes().decode("utf-8", "surrogateescape")

    def entry(self, sample: int) -> SampleEntry:
        """Everything the index knows of one sample."""
        return SampleEntry(self.shard_of(sample), self.key_of(sample), tuple(self._member_list(sample)))

    def read(self, sample: int) -> dict[str, bytes]:
        """A sample's files by extension, each checked against its crc32.

        Raises:
            DamagedSampleError: the tar is missing, cut short or changed since it was indexed.
        """
        shard, members = self.shard_of(sample), self._member_list(sample)
        start = members[0].offset
        length = members[-1].offset + members[-1].size - start
        if length > sum(member.size for member in members) + _MAX_GAP_BYTES * len(members):
            return {member.extension: self._checked(shard, member, *self._bytes(shard, member)) for member in members}
        block = self._pread(shard, start, length)
        return {member.extension: self._checked(shard, member, block, start) for member in members}

    def left_out(self) -> list[dict[str, str]]:
        """Shard, key and reason of what the index holds not, because it could not be used when the set was indexed."""
        path = self.folder / QUARANTINE_FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def shard_bytes(self, shard: str) -> int:
        """Size of a tar as it was indexed."""
        return self._shard_bytes[shard]

    def copy_shard(self, shard: str) -> None:
        """Have a remote tar's copy here; nothing to do for a local set.

        Raises:
            RemoteError: it did not arrive.
        """
        if self.remote is not None:
            self.remote.copy(shard, self._shard_bytes[shard])

    def _row(self, sample: int) -> int:
        """A sample's place in samples.npy."""
        return sample + self._shifts[bisect_right(self._shard_ends, sample)]

    def _member_list(self, sample: int) -> list[Member]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        row = self._row(sample)
        (first, _), (end, _) = self._samples[row : row + 2].tolist()
        names = self._extensions
        return [
            Member(names[extension], offset, size, crc32, width, height)
            for offset, size, crc32, extension, width, height in self._members[first:end].tolist()
        ]

    def _bytes(self, shard: str, member: Member) -> tuple[bytes, int]:
        return self._pread(shard, member.offset, member.size), member.offset

    def _pread(self, shard: str, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._descriptor(shard), length, offset)
        except OSError as error:
            raise DamagedSampleError(f"{shard}: cannot be read ({error.strerror})") from None

    def _checked(self, shard: str, member: Member, block: bytes, start: int) -> bytes:
        """The member's bytes out of a block that begins at `start`."""
        payload = block[member.offset - start : member.offset - start + member.size]
        if len(payload) != member.size:
            raise DamagedSampleError(
                f"{shard}: cut short, {member.extension} at byte {member.offset} has {len(payload)} of"
                f" {member.size} bytes"
            )
        if crc32(payload) != member.crc32:
            raise DamagedSampleError(
                f"{shard}: {member.extension} at byte {member.offset} changed since it was indexed"
            )
        return payload

    def _descriptor(self, shard: str) -> int:
        """An open file of the shard; the oldest is closed beyond a bounded number."""
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
            try:
                self.copy_shard(shard)
                self._files[shard] = os.open(self.folder / shard, os.O_RDONLY)
            except OSError as error:
                raise DamagedSampleError(f"{shard}: cannot be opened ({error.strerror})") from None
        return self._files[shard]


def _places(folder: Path, names: list[str], selection: tuple[str, ...] | None) -> list[int]:
    """The places, among all tars, of those selected."""
    if selection is None:
        return list(range(len(names)))
    known = {name: place for place, name in enumerate(names)}
    missing = [name for name in selection if name not in known]
    if missing:
        raise InputError(
            f"{folder}: its index lacks {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + f" of the {len(selection)} tars that are named; it holds {names[0]} to {names[-1]}"
        )
    if len(set(selection)) != len(selection):
        raise InputError(f"{folder}: a tar is named twice; name each once")
    return [known[name] for name in selection]


def _selected(fingerprint: str, chosen: list[str], all_names: list[str]) -> str:
    """The fingerprint of a selection: that of the set if every tar is in it, in the set's own order."""
    if chosen == all_names:
        return fingerprint
    return sha256("\0".join([fingerprint, *chosen]).encode()).hexdigest()[:32]


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META_FILE
    if not folder.is_dir():
        raise InputError(f"no shard set at {folder}: make one with `python -m tools.shards make {folder} …`")
    if not path.is_file():
        raise InputError(f"{folder} has no index: run `python -m tools.shards index {folder}`")
    try:
        meta: dict[str, Any] = json.loads(path.read_text())
        version = meta["version"]
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path} is damaged: run `python -m tools.shards index {folder}` again") from None
    if version != INDEX_VERSION:
        raise InputError(f"{path} has version {version}, this program reads {INDEX_VERSION}: index the set again")
    return meta


def _map_array(folder: Path, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    path = folder / INDEX_FOLDER / f"{name}.npy"
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        raise InputError(f"{path} is missing or damaged: run `python -m tools.shards index {folder}` again") from None
    if array.dtype != dtype:
        raise InputError(f"{path} holds {array.dtype}, expected {dtype}: index the set again")
    return np.asarray(array)  # a plain view of the mapping: slicing `memmap` itself is several times slower
