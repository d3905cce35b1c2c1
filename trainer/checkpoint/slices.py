"""The table of a checkpoint that says which elements of which parameters the ranks' files hold: one file for all ranks.

    rank r wrote [name, start, numel] ...  --pack--> its manifest entry --+
                                                                          +--> slices.npy, a row for each
    rank s wrote [name, start, numel] ...  --pack--> its manifest entry --+

A rank's file holds one flat tensor for each kind (the weights, each moment), which is the rank's slices end to end in
the order of their rows. So the table is all that a reader needs, and it opens no file to find out what is in it: under
ZeRO-3 there are ranks x parameters slices, half a million at 1,024 ranks.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.common.documents import parse
from models.common.errors import InputError

SLICES_FILE = "slices.npy"
ROW = np.dtype([("file", "<u4"), ("parameter", "<u4"), ("start", "<u8"), ("numel", "<u8")])
_AGAIN = "use another checkpoint"


@dataclass(frozen=True)
class Slice:
    """Elements [start, start + numel) of a flattened parameter of this shape."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int


def pack(slices: Sequence[Slice]) -> bytes:
    """The slices of one rank's file, small enough to be gathered from every rank: names repeat, and compress well."""
    return zlib.compress(json.dumps([[each.name, each.shape, each.start, each.numel] for each in slices]).encode())


def tabulate(packed: Mapping[str, bytes]) -> tuple[list[str], dict[str, list[int]], NDArray[Any]]:
    """The table of all ranks' files.

    Args:
        packed: by file name, what `pack` made of its slices.

    Returns:
        The files and the shapes of the parameters, both in the order of their numbers in the table, and the table.
    """
    files, shapes = sorted(packed), dict[str, list[int]]()
    numbers: dict[str, int] = {}
    rows: list[tuple[int, int, int, int]] = []
    for place, file in enumerate(files):
        for name, shape, start, numel in parse(zlib.decompress(packed[file]), file):
            rows.append((place, numbers.setdefault(name, len(numbers)), start, numel))
            shapes.setdefault(name, shape)
    return files, shapes, np.array(rows, dtype=ROW)


def read_table(directory: Path, num_files: int, shapes: Sequence[tuple[int, ...]]) -> NDArray[Any]:
    """The rows of slices.npy.

    Raises:
        InputError: it is damaged, or a row names a file, a parameter or elements that there are not.
    """
    file = directory / SLICES_FILE
    try:
        rows: NDArray[Any] = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); {_AGAIN}") from None
    if rows.dtype != ROW or rows.ndim != 1:
        raise InputError(f"{file}: {rows.dtype} of {rows.ndim} dimensions, not a table of slices; {_AGAIN}")
    if len(rows) and (rows["file"].max() >= num_files or rows["parameter"].max() >= len(shapes)):
        raise InputError(f"{file}: it names files or parameters that the manifest lacks; {_AGAIN}")
    sizes = np.array([math.prod(shape) for shape in shapes], dtype=np.uint64)
    size = sizes[rows["parameter"]]
    wrong = np.flatnonzero((rows["start"] > size) | (rows["numel"] > size - rows["start"]))
    if len(wrong):
        raise InputError(f"{file}: row {wrong[0]} has elements that its parameter lacks; {_AGAIN}")
    return rows
