"""Tensor by tensor in and out of safetensors: memory is bounded by one tensor, not by a file or a model.

Owns headers, files and their index; `models.runs` owns the bytes. What is wrong with a file is said with its name.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import InputError
from models.runs import Run, bytes_of, copy_run, read_runs, write_all
from models.source import read_json

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


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: bytes [start, start + num_bytes) of a file."""

    file: Path
    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of a model directory by name. Headers are read at once and checked; values when they are asked for.

    Raises InputError, naming the file, where there is none, one of the index is missing, or one is cut short.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._places: dict[str, Place] = {}
        for file in _weight_files(directory):
            for name, place in _read_header(file).items():
                if name in self._places:
                    raise InputError(f"{file}: {name} stands in {self._places[name].file.name} too; remove one of them")
                self._places[name] = place

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        """Every name, in the files' order."""
        return iter(self._places)

    def place(self, name: str) -> Place:
        """Where a tensor lies, its dtype and shape; raises InputError where the directory has no such tensor."""
        if name not in self._places:
            raise InputError(f"{self.directory}: no tensor {name} in its files; is it another model's directory?")
        return self._places[name]

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        place = self.place(name)
        return read_runs([Run(place.file, place.start, place.num_bytes)], place.dtype, place.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(place.num_bytes for place in self._places.values())


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model directory, one at a time, in the files' order."""
    files = TensorFiles(directory)
    for name in files:
        yield name, files.read(name)


def _weight_files(directory: Path) -> list[Path]:
    """The files that the index names, or where there is none, every .safetensors in the directory."""
    if (directory / INDEX).is_file():
        named = sorted({str(name) for name in read_json(directory, INDEX).get("weight_map", {}).values()})
        missing = [name for name in named if not (directory / name).is_file()]
        if missing:
            raise InputError(f"{directory / missing[0]}: missing ({INDEX} names {len(named)} files); fetch it again")
        return [directory / name for name in named]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise InputError(f"{directory}: no .safetensors in it; convert the weights (pickles are never opened)")
    return files


def _read_header(file: Path) -> dict[str, Place]:
    num_bytes = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if num_bytes < 8 or length > num_bytes - 8:
            raise InputError(f"{file}: cut short, it has {num_bytes} bytes; fetch or copy it again")
        try:
            header = json.loads(stream.read(length))
            places = {
                name: Place(
                    file,
                    8 + length + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                    DTYPES[entry["dtype"]],
                    tuple(entry["shape"]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"{file}: no safetensors file, its header cannot be read ({error})") from error
    end = max((place.start + place.num_bytes for place in places.values()), default=0)
    if end > num_bytes:
        raise InputError(f"{file}: cut short, it has {num_bytes} of {end} bytes; fetch or copy it again")
    return places


class ShardedWriter:
    """Writes tensors as they come into files of about `max_bytes`, and the index that transformers expects.

    A file's header is written last, into room kept free before the values, so no more than one tensor is held. Only
    small ones of an odd size wait for the file's end, since safetensors knows no gaps and whoever maps the file wants
    the others aligned. Raises OSError (a full disk, say) as the system does.
    """

    def __init__(self, directory: Path, max_bytes: int = 2_000_000_000, header_room: int = HEADER_ROOM) -> None:
        self._directory, self._max_bytes, self._header_room = directory, max_bytes, header_room
        self._stream: Any = None
        self._entries: dict[str, Any] = {}
        self._waiting: dict[str, Tensor] = {}
        self._header_bytes = self._num_file_bytes = self._num_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, value: Tensor) -> None:
        """Write one tensor, behind the one before it or into the next file."""
        value = value.detach().cpu().contiguous()
        num_bytes = value.numel() * value.element_size()
        self._make_room(name, num_bytes)
        if num_bytes % 8 and num_bytes < 1 << 20:
            self._waiting[name] = value
        else:
            self._write(name, value)

    def copy(self, name: str, runs: Sequence[Run], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Write a tensor whose bytes lie in files already, without holding it."""
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
