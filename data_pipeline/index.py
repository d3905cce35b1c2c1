"""A shard set on disk: a directory of tars and, in `index/`, where every member of every sample lies.

Owns the index's layout and reading samples by offset with their checksum. Does not own building it
(`data_pipeline.index_build`) nor what the bytes mean (`data_pipeline.record`).

    SET/*.tar
    SET/index/meta.json             version, fingerprint, shards [{name, num_bytes, num_samples}], extensions
    SET/index/sample_members.npy    u64 [N+1]  first member of each sample        N samples, M members
    SET/index/sample_keys.npy       u64 [N+1]  where each key begins in keys.npy
    SET/index/keys.npy              u8  [..]   keys, UTF-8, end to end
    SET/index/member_{offset u64, size u32, crc32 u32, extension u16, width u32, height u32}.npy   [M]

The arrays are memory-mapped: opening costs the same for a thousand samples as for ten million.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import InputError

INDEX_VERSION = 1
INDEX_FOLDER = "index"
ARRAYS: Mapping[str, str] = {
    "sample_members": "<u8",
    "sample_keys": "<u8",
    "keys": "|u1",
    "member_offset": "<u8",
    "member_size": "<u4",
    "member_crc32": "<u4",
    "member_extension": "<u2",
    "member_width": "<u4",
    "member_height": "<u4",
}
_MAX_OPEN_SHARDS = 64


class DamagedSampleError(InputError):
    """The bytes on disk are not those that were indexed."""


@dataclass(frozen=True, slots=True)
class Member:
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

    Raises:
        InputError: no index, another version, or an index that does not fit the tars beside it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        meta = _read_meta(self.folder)
        self.fingerprint: str = meta["fingerprint"]
        self.shard_names: list[str] = [shard["name"] for shard in meta["shards"]]
        self.shard_sizes: list[int] = [shard["num_samples"] for shard in meta["shards"]]
        self._extensions: list[str] = meta["extensions"]
        self._shard_ends = np.cumsum(self.shard_sizes, dtype=np.int64)
        self._arrays = {name: _map_array(self.folder, name, dtype) for name, dtype in ARRAYS.items()}
        self._files: dict[str, int] = {}
        if len(self._arrays["sample_members"]) != len(self) + 1:
            raise InputError(f"{self.folder}: the index does not fit its meta.json; run `tools.shards index` again")

    def __len__(self) -> int:
        return int(self._shard_ends[-1]) if len(self._shard_ends) else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex, (self.folder,)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def shard_of(self, sample: int) -> str:
        """Name of the tar that holds a sample."""
        return self.shard_names[int(np.searchsorted(self._shard_ends, sample, side="right"))]

    def key_of(self, sample: int) -> str:
        """A sample's key: its members' common name."""
        start, end = (int(value) for value in self._arrays["sample_keys"][sample : sample + 2])
        return bytes(self._arrays["keys"][start:end]).decode("utf-8", "surrogateescape")

    def entry(self, sample: int) -> SampleEntry:
        """Everything the index knows of one sample."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        first, end = (int(value) for value in self._arrays["sample_members"][sample : sample + 2])
        members = tuple(self._member(place) for place in range(first, end))
        return SampleEntry(self.shard_of(sample), self.key_of(sample), members)

    def read(self, sample: int) -> dict[str, bytes]:
        """A sample's files by extension, each checked against its crc32.

        Raises:
            DamagedSampleError: the tar is missing, cut short or changed since it was indexed.
        """
        entry = self.entry(sample)
        return {member.extension: self._read_member(entry.shard, member) for member in entry.members}

    def _member(self, place: int) -> Member:
        arrays = self._arrays
        return Member(
            self._extensions[int(arrays["member_extension"][place])],
            int(arrays["member_offset"][place]),
            int(arrays["member_size"][place]),
            int(arrays["member_crc32"][place]),
            int(arrays["member_width"][place]),
            int(arrays["member_height"][place]),
        )

    def _read_member(self, shard: str, member: Member) -> bytes:
        payload = os.pread(self._descriptor(shard), member.size, member.offset)
        if len(payload) != member.size:
            raise DamagedSampleError(
                f"{shard}: cut short, {member.extension} at byte {member.offset} has {len(payload)} of"
                f" {member.size} bytes"
            )
        if zlib.crc32(payload) != member.crc32:
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
                self._files[shard] = os.open(self.folder / shard, os.O_RDONLY)
            except OSError as error:
                raise DamagedSampleError(f"{shard}: cannot be opened ({error.strerror})") from None
        return self._files[shard]


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FOLDER / "meta.json"
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


def _map_array(folder: Path, name: str, dtype: str) -> NDArray[Any]:
    path = folder / INDEX_FOLDER / f"{name}.npy"
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        raise InputError(f"{path} is missing or damaged: run `python -m tools.shards index {folder}` again") from None
    if array.dtype != np.dtype(dtype):
        raise InputError(f"{path} holds {array.dtype}, expected {dtype}: index the set again")
    return array
