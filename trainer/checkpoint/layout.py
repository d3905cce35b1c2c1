"""Where in the files of a checkpoint the elements of each parameter and of its moments lie, as columns of numbers.

    elements [a, b) of parameters --Layout.pieces--> (file, byte, length) in the order of the files --> `piecewise`

Owns the arithmetic over both formats: version 2 has the table `slices.npy`; in version 1, and in the file of inherited
weights, each file's header says what it holds. Reads no values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.common.errors import InputError
from models.common.sharded import DTYPES, StoredTensor, read_header
from trainer.checkpoint.records import Manifest, read_slices
from trainer.checkpoint.slices import read_table

IntArray = NDArray[np.int64]
TYPES = list(DTYPES)
"""A dtype's code in a column is its place here."""
ITEMSIZES: IntArray = np.array([dtype.itemsize for dtype in DTYPES.values()], dtype=np.int64)
_AGAIN = "use another checkpoint"


class Column(NamedTuple):
    """Where the values of one kind (weights, or a moment) begin, for each slice."""

    offset: IntArray
    """The byte in the file; -1 where the file has none of this kind."""
    dtype: IntArray
    """A code of `TYPES`."""


class Wanted(NamedTuple):
    """Elements [start, start + numel) of a flattened parameter."""

    name: str
    start: int
    numel: int


class Pieces(NamedTuple):
    """What is to be read, one entry a piece, in the order of files and bytes."""

    file: IntArray
    offset: IntArray
    dtype: IntArray
    numel: IntArray
    wanted: IntArray
    """The place of what it is a piece of among what was asked for."""
    at: IntArray
    """The element of that at which the piece begins."""


@dataclass(frozen=True)
class Layout:
    """Slices by parameter and start: entry i is elements [start[i], stop[i]) of a parameter, in file[i]."""

    files: Sequence[Path]
    shapes: Mapping[str, tuple[int, ...]]
    """By parameter, in the order of their numbers."""
    first: IntArray
    """[parameters + 1]: the slices of parameter p are first[p] to first[p + 1]."""
    file: IntArray
    start: IntArray
    stop: IntArray
    kinds: Mapping[str, Column]
    numbers: Mapping[str, int]

    def pieces(self, kind: str, wanted: Sequence[Wanted], where: Path) -> Pieces:
        """The pieces of the files that make up what is wanted.

        Raises:
            InputError: no file holds some of the elements.
        """
        spans = [self._span(each, where) for each in wanted]
        slices = np.concatenate([np.arange(low, high) for low, high in spans] or [np.empty(0, np.int64)])
        owner = np.repeat(np.arange(len(wanted)), [high - low for low, high in spans])
        begin = np.array([each.start for each in wanted], dtype=np.int64)[owner]
        end = begin + np.array([each.numel for each in wanted], dtype=np.int64)[owner]
        low, high = np.maximum(begin, self.start[slices]), np.minimum(end, self.stop[slices])
        column = self.kinds.get(kind)
        held = np.zeros(len(slices), dtype=bool) if column is None else column.offset[slices] >= 0
        counts = np.bincount(owner[held], weights=(high - low)[held], minlength=len(wanted))
        for each, count in zip(wanted, counts.tolist(), strict=True):
            if int(count) != each.numel:
                raise InputError(
                    f"{where}: {kind} of {each.name} has {int(count)} of {each.numel} elements; "
                    "a rank's file is missing"
                )
        if column is None:
            return Pieces(*(np.empty(0, np.int64) for _ in Pieces._fields))
        dtype = column.dtype[slices]
        offset = column.offset[slices] + (low - self.start[slices]) * ITEMSIZES[dtype]
        order = np.lexsort((offset, self.file[slices]))
        order = order[(high > low)[order]]
        columns = (self.file[slices], offset, dtype, high - low, owner, low - begin)
        return Pieces(*(each[order] for each in columns))

    def _span(self, wanted: Wanted, where: Path) -> tuple[int, int]:
        """The slices that hold some of what is wanted."""
        number = self.numbers.get(wanted.name)
        if number is None:
            raise InputError(f"{where}: it does not hold {wanted.name}; {_AGAIN}")
        first, last = int(self.first[number]), int(self.first[number + 1])
        low = first + int(np.searchsorted(self.stop[first:last], wanted.start, side="right"))
        high = first + int(np.searchsorted(self.start[first:last], wanted.start + wanted.numel, side="left"))
        return low, max(low, high)


class _Slices(NamedTuple):
    """Slices in the order of the files: parameter, file, start and stop of each, and its columns."""

    parameter: IntArray
    file: IntArray
    start: IntArray
    stop: IntArray
    kinds: Mapping[str, Column]


def read_layout(directory: Path, manifest: Manifest) -> Layout:
    """The layout of a checkpoint, from its manifest and, where that does not say it, its files' headers.

    Raises:
        InputError: a table or a header is damaged, or two files give a parameter different shapes.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    ranked = manifest.get("ranks", [])
    others = sorted(name for name in manifest["files"].keys() - set(ranked) if name.endswith(".safetensors"))
    parts = [_of_header(directory / name, len(ranked) + place, shapes) for place, name in enumerate(others)]
    if ranked:
        parts.append(_of_table(directory, manifest, shapes))
    files = [directory / name for name in (*ranked, *others)]
    return _joined(files, shapes, parts)


def _of_table(directory: Path, manifest: Manifest, shapes: dict[str, tuple[int, ...]]) -> _Slices:
    """The slices of the ranks' files, which slices.npy lists in the order of the files and of their bytes."""
    told = {name: tuple(shape) for name, shape in manifest.get("parameters", {}).items()}
    ranked = manifest.get("ranks", [])
    rows = read_table(directory, len(ranked), list(told.values()))
    for name, shape in told.items():
        if shapes.setdefault(name, shape) != shape:
            raise InputError(f"{directory / 'manifest.json'}: {name} has shape {list(shape)}, elsewhere another")
    places = {name: place for place, name in enumerate(shapes)}
    numbers: IntArray = np.array([places[name] for name in told], dtype=np.int64)
    file, start, numel = (rows[name].astype(np.int64) for name in ("file", "start", "numel"))
    totals = np.bincount(file, weights=numel, minlength=len(ranked)).astype(np.int64)
    position = np.cumsum(numel) - numel - (np.cumsum(totals) - totals)[file]
    columns = {}
    for kind, begins in _begins(directory, manifest, totals).items():
        offset = np.where(begins[file] >= 0, begins[file] + 4 * position, -1)
        columns[kind] = Column(offset, np.full(len(rows), TYPES.index("F32"), dtype=np.int64))
    return _Slices(numbers[rows["parameter"]], file, start, start + numel, columns)


def _begins(directory: Path, manifest: Manifest, numels: IntArray) -> dict[str, IntArray]:
    """For each kind the byte at which its values begin in each rank's file, -1 where it has none."""
    found: dict[str, IntArray] = {}
    for place, name in enumerate(manifest.get("ranks", [])):
        entry = manifest["files"].get(name)
        if entry is None or "kinds" not in entry:
            raise InputError(f"{directory / 'manifest.json'}: files: {name}: kinds: missing; {_AGAIN}")
        for kind, begin in entry["kinds"].items():
            if begin + 4 * int(numels[place]) > entry["bytes"]:
                raise InputError(f"{directory / name}: shorter than the slices that it should hold; {_AGAIN}")
            found.setdefault(kind, np.full(len(numels), -1, np.int64))[place] = begin
    return found


def _of_header(file: Path, place: int, shapes: dict[str, tuple[int, ...]]) -> _Slices:
    """The slices of a file that says itself what it holds: KIND/PARAMETER, each flat."""
    tensors, numbers, starts, stops = read_header(file).tensors, [], [], []
    slices = read_slices(file)
    order = {name: number for number, name in enumerate(dict.fromkeys([*shapes, *slices]))}
    kinds = {name.partition("/")[0] for name in tensors}
    found: dict[str, list[tuple[int, int]]] = {kind: [] for kind in sorted(kinds)}
    for name, entry in slices.items():
        start, shape = entry["start"], tuple(entry["shape"])
        stop = start + _flat(tensors, f"weight/{name}", file).shape[0]
        if stop > int(np.prod(shape, dtype=object)) or shapes.setdefault(name, shape) != shape:
            raise InputError(f"{file}: {name} has elements {start} to {stop} of shape {list(shape)}")
        numbers.append(order[name])
        starts.append(start)
        stops.append(stop)
        for kind, column in found.items():
            column.append(_place_of(tensors, kind, name, stop - start, file))
    columns = {
        kind: Column(np.array([at for at, _ in places], np.int64), np.array([code for _, code in places], np.int64))
        for kind, places in found.items()
    }
    integers = (np.array(numbers, np.int64), np.full(len(numbers), place, np.int64))
    return _Slices(*integers, np.array(starts, np.int64), np.array(stops, np.int64), columns)


def _place_of(tensors: Mapping[str, StoredTensor], kind: str, name: str, numel: int, file: Path) -> tuple[int, int]:
    """The first byte and the dtype's code of a slice; (-1, 0) where the file does not hold this kind of it."""
    if f"{kind}/{name}" not in tensors:
        return -1, 0
    tensor = _flat(tensors, f"{kind}/{name}", file)
    if tensor.shape[0] != numel:
        raise InputError(f"{file}: {kind} of {name} has {tensor.shape[0]} elements, not as its weight")
    return tensor.start, list(DTYPES.values()).index(tensor.dtype)


def _flat(tensors: Mapping[str, StoredTensor], name: str, file: Path) -> StoredTensor:
    if name not in tensors:
        raise InputError(f"{file}: no tensor {name} in it; {_AGAIN}")
    if len(tensors[name].shape) != 1:
        raise InputError(f"{file}: {name} has shape {list(tensors[name].shape)}; a checkpoint's are flat")
    return tensors[name]


def _joined(files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]], parts: Sequence[_Slices]) -> Layout:
    """The slices of all parts, by parameter and start."""
    parameter, file, start, stop = (_stack(part[place] for part in parts) for place in range(4))
    order = np.lexsort((start, parameter))
    names = sorted({kind for part in parts for kind in part.kinds})
    kinds = {}
    for kind in names:
        columns = [part.kinds.get(kind, _absent(len(part.file))) for part in parts]
        kinds[kind] = Column(*(_stack(column[place] for column in columns)[order] for place in range(2)))
    first = np.searchsorted(parameter[order], np.arange(len(shapes) + 1))
    numbers = {name: number for number, name in enumerate(shapes)}
    return Layout(files, shapes, first, file[order], start[order], stop[order], kinds, numbers)


def _absent(length: int) -> Column:
    return Column(np.full(length, -1, np.int64), np.zeros(length, np.int64))


def _stack(columns: Iterable[Any]) -> IntArray:
    return np.concatenate([np.empty(0, np.int64), *columns]).astype(np.int64)
