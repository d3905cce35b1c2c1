"""A shard set on disk: a directory of tars and, in `index/`, the location of every member of every sample.

Owns the index's layout and reading samples by offset with their checksum. Does not own building it
(`data_pipeline.index_build`) nor what the bytes mean (`data_pipeline.record`).

    SET/*.tar
    SET/index/meta.json             version, fingerprint, extensions, array_bytes,
                                    shards [{name, num_bytes, num_samples}]
    SET/index/samples.npy           [N+1] first member, begin of the key in keys.npy          N samples, M members
    SET/index/members.npy           [M]   offset, size, crc32, extension's number, width, height
    SET/index/keys.npy              [..]  keys, UTF-8, end to end
    SET/quarantine.jsonl            samples left out, if any: shard, key, reason

The arrays are memory-mapped: opening costs the same for a thousand samples as for ten million. A sample's rows are one
slice, and its members are read with one call, which makes reading fast.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from data_pipeline.index_meta import INDEX_FOLDER, IndexMeta, check_room, read_meta
from data_pipeline.remote import RemoteSet
from data_pipeline.tar_bytes import DamagedSampleError, TarBytes
from models.common.documents import Text
from models.common.errors import InputError
from models.common.files import read_lines

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
_LEFT_OUT: Any = dict[Text, Text]
_MAX_GAP_BYTES = 16 * 1024
"""Members of a sample less than this many bytes apart are read with one call."""
_MAX_MEMBERS = 1 << 16
"""Files of one sample, beyond which an index is damaged."""


class Member(NamedTuple):
    """One file of a sample. `width` and `height` are 0 where it is not an image."""

    extension: str
    offset: int
    size: int
    crc32: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """The location of one sample: its shard, key and members."""

    shard: str
    key: str
    members: tuple[Member, ...]


class ShardIndex:
    """An opened shard set; `ShardIndex.open` opens one. Cheap to pickle: a worker opens it again from its path."""

    def __init__(
        self,
        folder: Path,
        meta: IndexMeta,
        arrays: Mapping[str, NDArray[Any]],
        *,
        remote: RemoteSet | None = None,
        selection: tuple[str, ...] | None = None,
    ) -> None:
        self.folder = folder
        self.remote, self._selection = remote, selection
        all_names: list[str] = [shard["name"] for shard in meta["shards"]]
        all_sizes: list[int] = [shard["num_samples"] for shard in meta["shards"]]
        chosen = _places(folder, all_names, selection)
        self.shard_names: list[str] = [all_names[place] for place in chosen]
        self.shard_sizes: list[int] = [all_sizes[place] for place in chosen]
        self.fingerprint: str = _selected(meta["fingerprint"], self.shard_names, all_names)
        self._shard_bytes: dict[str, int] = {shard["name"]: shard["num_bytes"] for shard in meta["shards"]}
        self._extensions: list[str] = meta["extensions"]
        self._shard_ends: list[int] = np.cumsum(self.shard_sizes, dtype=np.int64).tolist()
        all_ends = np.cumsum(all_sizes, dtype=np.int64)
        self._shifts: list[int] = (all_ends[chosen] - np.array(self._shard_ends, dtype=np.int64)).tolist()
        """From a sample's number to its row, by shard: all 0 where every tar is selected."""
        self._samples, self._members, self._keys = arrays["samples"], arrays["members"], arrays["keys"]
        self.tars = TarBytes(folder, remote, self._shard_bytes)
        self._at_once = (0, 1)
        if len(self._samples) != sum(all_sizes) + 1:
            raise InputError(f"{folder}: the index does not fit its meta.json; run `tools.shards index` again")

    @classmethod
    def open(
        cls, folder: Path | str, remote: RemoteSet | None = None, selection: tuple[str, ...] | None = None
    ) -> ShardIndex:
        """Read a set's meta.json and map its arrays; no tar is opened before a sample of it is read.

        Args:
            folder: the set's directory, or the directory for copies of a remote set.
            remote: the source of files that are not in `folder`.
            selection: the tars to use, in this order; None: all of them, in the index's order.

        Raises:
            InputError: no index, another version, an index that does not match the tars next to it, or a tar selected
                that the index lacks.
        """
        folder = Path(folder)
        meta = read_meta(folder, ARRAYS)
        _places(folder, [shard["name"] for shard in meta["shards"]], selection)  # before anything is copied
        if remote is not None:
            check_room(meta, remote.max_bytes, remote.url)
            for name in ARRAYS:
                remote.copy(f"{INDEX_FOLDER}/{name}.npy", meta["array_bytes"][name])
        arrays = {name: _map_array(folder, name, dtype) for name, dtype in ARRAYS.items()}
        return cls(folder, meta, arrays, remote=remote, selection=selection)

    def __len__(self) -> int:
        return int(self._shard_ends[-1]) if self._shard_ends else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.folder, self.remote, self._selection, self._at_once)

    def read_at_once(self, num_tars: int, num_ranks: int = 1) -> None:
        """Prepare for reading so many tars in turn, in this process and in workers that get a copy.

        Args:
            num_ranks: how many ranks share a remote set's cache.
        """
        self._at_once = (num_tars, num_ranks)
        self.tars.expect(num_tars, num_ranks)

    def shard_of(self, sample: int) -> str:
        """Name of the tar that holds a sample."""
        return self.shard_names[bisect_right(self._shard_ends, sample)]

    def key_of(self, sample: int) -> str:
        """A sample's key: its members' common name."""
        row = self._row(sample)
        (_, start), (_, end) = self._samples[row : row + 2].tolist()
        return self._keys[start:end].tobytes().decode("utf-8", "surrogateescape")

    def entry(self, sample: int) -> SampleEntry:
        """The index entry of one sample."""
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
        block = self.tars.read(shard, start, length)
        return {member.extension: self._checked(shard, member, block, start) for member in members}

    def left_out(self) -> list[dict[str, str]]:
        """Shard, key and reason of each sample left out because it could not be used when the set was indexed."""
        path = self.folder / QUARANTINE_FILE
        return read_lines(path, _LEFT_OUT)

    def count_members(self) -> dict[tuple[str, bool], int]:
        """How many members there are of each (extension, whether it is an image); unselected tars are included."""
        is_image = self._members["width"] > 0
        found: dict[tuple[str, bool], int] = {}
        for kind in (False, True):
            counts = np.bincount(self._members["extension"][is_image == kind], minlength=len(self._extensions))
            found |= {
                (name, kind): count for name, count in zip(self._extensions, counts.tolist(), strict=True) if count
            }
        return found

    def lists(self, shard: str) -> bool:
        """Whether the index knows a tar, selected or not."""
        return shard in self._shard_bytes

    def shard_bytes(self, shard: str) -> int:
        """Size of a tar as it was indexed."""
        return self._shard_bytes[shard]

    def copy_shard(self, shard: str) -> None:
        """Copy a remote tar into the cache; does nothing for a local set, or where parts of tars are read.

        Raises:
            RemoteError: the copy failed.
        """
        self.tars.copy(shard)

    def _row(self, sample: int) -> int:
        """A sample's row in samples.npy."""
        return sample + self._shifts[bisect_right(self._shard_ends, sample)]

    def _member_list(self, sample: int) -> list[Member]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        row = self._row(sample)
        (first, _), (end, _) = self._samples[row : row + 2].tolist()
        names, shard = self._extensions, self.shard_of(sample)
        if not 0 < end - first <= _MAX_MEMBERS or end > len(self._members):
            raise DamagedSampleError(
                f"{shard}: sample {sample} of its index has no members that can be; index it again"
            )
        rows = self._members[first:end].tolist()
        end_byte, extension = max(row[0] + row[1] for row in rows), max(row[3] for row in rows)
        if end_byte > self._shard_bytes[shard] or extension >= len(names):
            raise DamagedSampleError(f"{shard}: the index of sample {sample} does not fit the tar; index it again")
        return [
            Member(names[extension], offset, size, crc32, width, height)
            for offset, size, crc32, extension, width, height in rows
        ]

    def _bytes(self, shard: str, member: Member) -> tuple[bytes, int]:
        return self.tars.read(shard, member.offset, member.size), member.offset

    def _checked(self, shard: str, member: Member, block: bytes, start: int) -> bytes:
        """The member's bytes from a block that begins at `start`, checked against its crc32."""
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


def _reopened(
    folder: Path, remote: RemoteSet | None, selection: tuple[str, ...] | None, at_once: tuple[int, int]
) -> ShardIndex:
    """A copy of an index in another process."""
    index = ShardIndex.open(folder, remote, selection)
    index.read_at_once(*at_once)
    return index


def _places(folder: Path, names: list[str], selection: tuple[str, ...] | None) -> list[int]:
    """The indices of the selected tars among all tars."""
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


def _map_array(folder: Path, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    path = folder / INDEX_FOLDER / f"{name}.npy"
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        raise InputError(f"{path} is missing or damaged: run `python -m tools.shards index {folder}` again") from None
    if array.dtype != dtype:
        raise InputError(f"{path} holds {array.dtype}, expected {dtype}: index the set again")
    return np.asarray(array)  # a plain view of the mapping: slicing `memmap` itself is several times slower
