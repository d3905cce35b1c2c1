"""Reads and writes safetensors one tensor at a time: memory is bounded by one tensor, not by a file or a model.

Owns headers, files and their index; `models.common.byte_ranges` owns the bytes. Errors name the file. Every safetensors
file that this program opens is looked at here first (`read_header`), a model's before transformers loads it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from models.common.byte_ranges import ByteRange, bytes_of, copy_run, read_runs, write_all
from models.common.documents import Text, bare_name, check, parse, read_as
from models.common.errors import InputError

INDEX = "model.safetensors.index.json"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_ROOM = 1 << 16
"""Bytes kept free for a file's header, which is written last; safetensors takes spaces at a header's end."""
MAX_HEADER_BYTES = 100_000_000
"""The safetensors library reads no longer header."""
_AGAIN = "fetch or copy it again"

_Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Entry(TypedDict):
    """A tensor in a header."""

    dtype: str
    shape: list[_Count]
    data_offsets: Annotated[list[_Count], Field(min_length=2, max_length=2)]


class _Index(TypedDict):
    """model.safetensors.index.json."""

    weight_map: dict[Text, Text]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in a safetensors file: bytes [start, start + num_bytes) of a file."""

    file: Path
    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: its tensors by name, and texts of whoever wrote it."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


class TensorFiles:
    """The tensors of a model directory by name; values are read on demand."""

    def __init__(self, directory: Path, stored: dict[str, StoredTensor]) -> None:
        self.directory = directory
        """Or the one file."""
        self._stored = stored

    @classmethod
    def open(cls, directory: Path) -> TensorFiles:
        """Read the headers of all files, and check them.

        Raises InputError, naming the file, where there is none, one of the index is missing, one is cut short, or two
        hold the same tensor.
        """
        stored: dict[str, StoredTensor] = {}
        for file in _weight_files(directory):
            for name, tensor in read_header(file).tensors.items():
                if name in stored:
                    raise InputError(f"{file}: {name} stands in {stored[name].file.name} too; remove one of them")
                stored[name] = tensor
        return cls(directory, stored)

    @classmethod
    def of_file(cls, file: Path) -> TensorFiles:
        """The tensors of one file. Raises InputError as `read_header` does."""
        return cls(file, read_header(file).tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        """Every name, in the files' order."""
        return iter(self._stored)

    def stored(self, name: str) -> StoredTensor:
        """A tensor's byte range, dtype and shape; raises InputError where the directory has no such tensor."""
        if name not in self._stored:
            raise InputError(f"{self.directory}: no tensor {name} in its files; is it another model's directory?")
        return self._stored[name]

    def read(self, name: str) -> Tensor:
        """One tensor, newly allocated."""
        tensor = self.stored(name)
        return read_runs([ByteRange(tensor.file, tensor.start, tensor.num_bytes)], tensor.dtype, tensor.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; raises InputError where the directory has no such tensor."""
        return self.stored(name).shape

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self._stored.values())


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model directory, one at a time, in the files' order."""
    files = TensorFiles.open(directory)
    for name in files:
        yield name, files.read(name)


def has_tensor_files(directory: Path) -> bool:
    """Whether weights are there as safetensors, or are said to be."""
    return (directory / INDEX).is_file() or any(directory.glob("*.safetensors"))


def _weight_files(directory: Path) -> list[Path]:
    """The files that the index names, or without an index every .safetensors in the directory."""
    index = directory / INDEX
    if index.is_file():
        weight_map = read_as(index, _Index, _AGAIN)["weight_map"]
        named = sorted({bare_name(name, index, "weight_map") for name in weight_map.values()})
        missing = [name for name in named if not (directory / name).is_file()]
        if missing:
            raise InputError(f"{directory / missing[0]}: missing ({INDEX} names {len(named)} files); fetch it again")
        return [directory / name for name in named]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise InputError(f"{directory}: no .safetensors in it; convert the weights (pickles are never opened)")
    return files


def read_header(file: Path) -> Header:
    """The tensors of a safetensors file, each known to lie within it, and its metadata; no tensor is read.

    Raises:
        InputError: it is cut short or no safetensors file; a tensor's dtype is not known, or its shape, offsets and the
            file's size do not fit together.
    """
    num_bytes = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if num_bytes < 8 or length > num_bytes - 8:
            raise InputError(f"{file}: cut short, it has {num_bytes} bytes; {_AGAIN}")
        if length > MAX_HEADER_BYTES:
            raise InputError(f"{file}: no safetensors file, its header would have {length} bytes; {_AGAIN}")
        content = stream.read(length)
    where = f"{file}: no safetensors file, its header"
    header = check(parse(content, where, _AGAIN), _HEADER, where, _AGAIN)
    metadata = check(header.pop("__metadata__", {}), _METADATA, where, _AGAIN)
    check(header, _ENTRIES, where, _AGAIN)
    return Header({name: _stored(file, name, entry, 8 + length, num_bytes) for name, entry in header.items()}, metadata)


_HEADER: Any = dict[Text, Any]
_METADATA: Any = dict[Text, Text]
_ENTRIES: Any = dict[Text, _Entry]


def _stored(file: Path, name: str, entry: _Entry, start: int, num_file_bytes: int) -> StoredTensor:
    dtype, shape, (first, last) = DTYPES.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    if dtype is None:
        raise InputError(f"{file}: {name} has dtype {entry['dtype'][:20]!r}; there are {', '.join(DTYPES)}")
    if math.prod(shape) * dtype.itemsize != last - first:
        raise InputError(
            f"{file}: {name} has {last - first} bytes, {math.prod(shape) * dtype.itemsize} by its shape {list(shape)}"
            f" in {entry['dtype']}; {_AGAIN}"
        )
    if start + last > num_file_bytes:
        raise InputError(f"{file}: cut short, it has {num_file_bytes} of {start + last} bytes; {_AGAIN}")
    return StoredTensor(file, start + first, last - first, dtype, shape)


class ShardedWriter:
    """Writes tensors in the order given into files of about `max_bytes`, and the index that transformers expects.

    A file's header is written last, into space reserved before the values, so no more than one tensor is held. Only
    small ones of an odd size wait for the file's end, since safetensors allows no gaps and readers that map the file
    need the others aligned. Raises OSError, for a full disk for example.
    """

    def __init__(self, directory: Path, max_bytes: int = 2_000_000_000, header_room: int = HEADER_ROOM) -> None:
        self._directory, self._max_bytes, self._header_room = directory, max_bytes, header_room
        self._stream: Any = None
        self._entries: dict[str, Any] = {}
        self._waiting: dict[str, Tensor] = {}
        self._header_bytes = self._num_file_bytes = self._num_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, value: Tensor) -> None:
        """Write one tensor, after the previous one or into the next file."""
        value = value.detach().cpu().contiguous()
        num_bytes = value.numel() * value.element_size()
        self._make_room(name, num_bytes)
        if num_bytes % 8 and num_bytes < 1 << 20:
            self._waiting[name] = value
        else:
            self._write(name, value)

    def copy(self, name: str, runs: Sequence[ByteRange], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Write a tensor whose bytes are already in files, without loading it."""
        num_bytes = sum(run.num_bytes for run in runs)
        if num_bytes % 8:
            self.add(name, read_runs(runs, dtype, shape))
            return
        self._make_room(name, num_bytes)
        for run in runs:
            copy_run(run, self._stream)
        self._note(name, dtype, shape, num_bytes)

    def _make_room(self, name: str, num_bytes: int) -> None:
        """Begin the next file where this one would be too large."""
        room = len(name) + 120
        is_full = self._num_file_bytes + num_bytes > self._max_bytes or self._header_bytes + room > self._header_room
        if self._header_bytes and is_full:
            self._finish_file()
        if self._stream is None:
            self._open_file()
        self._header_bytes += room

    def _write(self, name: str, value: Tensor) -> None:
        write_all(bytes_of(value), self._stream)
        self._note(name, value.dtype, tuple(value.shape), value.numel() * value.element_size())

    def _note(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], num_bytes: int) -> None:
        start, stop = self._num_file_bytes, self._num_file_bytes + num_bytes
        self._entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        self._num_file_bytes = stop
        self._num_bytes += stop - start

    def _open_file(self) -> None:
        self._stream = (self._directory / f"part-{len(self._shards)}").open("wb", buffering=0)
        self._stream.seek(8 + self._header_room)
        self._header_bytes = self._num_file_bytes = 0

    def _finish_file(self) -> None:
        for name, value in sorted(self._waiting.items(), key=lambda item: -item[1].element_size()):
            self._write(name, value)
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}, separators=(",", ":")).encode()
        assert len(header) <= self._header_room, "the room for an entry is more than it takes"
        self._stream.seek(0)
        write_all(memoryview(struct.pack("<Q", self._header_room) + header.ljust(self._header_room)), self._stream)
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._shards.append(list(self._entries))
        self._stream, self._entries, self._waiting = None, {}, {}
        self._header_bytes = 0

    def close(self) -> None:
        """Finish the last file and give all of them their final names."""
        if self._stream is None and not self._shards:
            self._open_file()
        if self._stream is not None:
            self._finish_file()
        total = len(self._shards)
        if total == 1:
            (self._directory / "part-0").rename(self._directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
            (self._directory / f"part-{number}").rename(self._directory / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._num_bytes}, "weight_map": weight_map}
        (self._directory / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
