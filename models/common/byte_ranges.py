"""Byte ranges of files: read into a tensor, or copied to another file without loading them into memory.

No memory maps: a mapped page that was touched counts as memory of the process for as long as the map lives. Does not
own which bytes make which tensor (models.common.sharded, and the readers of other formats).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.common.errors import InputError

BLOCK_BYTES = 1 << 20
"""Bytes per copy where the kernel cannot copy."""


@dataclass(frozen=True)
class ByteRange:
    """Bytes [start, start + num_bytes) of a file."""

    file: Path
    start: int
    num_bytes: int


def read_runs(runs: Sequence[ByteRange], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A newly allocated tensor with the concatenated bytes of `runs`.

    Raises InputError, naming the file, where one ends too early.
    """
    value, filled = torch.empty(shape, dtype=dtype), 0
    view = bytes_of(value)
    for run in runs:
        with run.file.open("rb", buffering=0) as source:
            source.seek(run.start)
            _fill(source, view[filled : filled + run.num_bytes], run.file)
        filled += run.num_bytes
    return value


def copy_run(run: ByteRange, target: Any) -> None:
    """Write the bytes of a run to an unbuffered file, on Linux within the kernel at less than half the cost.

    Raises InputError as `read_runs` does, and OSError, naming the target, where it is full or fails.
    """
    start, stop = run.start, run.start + run.num_bytes
    with run.file.open("rb", buffering=0) as source:
        while start < stop and sys.platform == "linux":
            try:
                num_copied = naming(target, os.sendfile, target.fileno(), source.fileno(), start, stop - start)
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    break  # a file system that offers no such thing
                raise
            if not num_copied:
                raise _cut_short(run.file)
            start += num_copied
        source.seek(start)
        while start < stop:
            block = memoryview(bytearray(min(BLOCK_BYTES, stop - start)))
            _fill(source, block, run.file)
            write_all(block, target)
            start += len(block)


def write_all(view: memoryview, target: Any) -> None:
    """Write to an unbuffered file; one write may take only a part, at most 2 GiB."""
    written = 0
    while written < len(view):
        written += naming(target, target.write, view[written:])


def naming(target: Any, call: Callable[..., int], *arguments: Any) -> int:
    """Call the system; an OSError gets the target's name."""
    try:
        return call(*arguments)
    except OSError as error:
        raise OSError(error.errno, error.strerror, target.name) from error


def bytes_of(value: Tensor) -> memoryview:
    """A contiguous tensor's bytes, in place."""
    flat: Any = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else bytearray()
    return memoryview(flat)


def _fill(source: Any, view: memoryview, file: Path) -> None:
    filled = 0
    while filled < len(view):
        num_read = source.readinto(view[filled:])
        if not num_read:
            raise _cut_short(file)
        filled += num_read


def _cut_short(file: Path) -> InputError:
    return InputError(f"{file}: cut short while it was read; fetch or copy it again")
