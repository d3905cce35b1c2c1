"""The JSON in and around a checkpoint: what each document may say, and the one place where it is read.

    RUN/STAGE/finished.json                names the last checkpoint
    RUN/STAGE/rollbacks.jsonl              a line for each rollback
    RUN/STAGE/checkpoints/*/manifest.json  names, sizes and digests of its files; the parameters' shapes
                         .../state.json    the stage's state and record
                         .../*.safetensors which elements of which parameters they hold, in their metadata

Names become paths only if they are bare, and lie where they say they lie. Does not own what the values mean.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from models.common.documents import bare_name, check, parse, read_as
from models.common.errors import InputError
from models.common.files import read_lines
from models.common.sharded import read_header

ROLLBACKS = "rollbacks.jsonl"
_AGAIN = "restore it from a copy, or use another checkpoint"

_Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class FileEntry(TypedDict):
    """A file of a checkpoint."""

    bytes: _Count
    sha256: str
    kinds: NotRequired[dict[str, _Count]]
    """Of a rank's file: the byte at which the values of each kind begin."""


class Manifest(TypedDict):
    """manifest.json. Version 1 lists only files."""

    version: NotRequired[int]
    files: dict[str, FileEntry]
    ranks: NotRequired[list[str]]
    """The ranks' files, in the order of their numbers in slices.npy."""
    parameters: NotRequired[dict[str, list[_Count]]]
    """The shape of each parameter, likewise."""


class SliceEntry(TypedDict):
    """Which elements of a parameter a file holds, and the parameter's whole shape."""

    start: _Count
    shape: list[_Count]


class _Slot(TypedDict):
    next: _Count
    open: list[_Count]
    num_bad: NotRequired[_Count]
    num_too_long: NotRequired[_Count]
    num_shrunk: NotRequired[_Count]


class _Stream(TypedDict):
    version: NotRequired[int]
    fingerprint: NotRequired[str]
    excluded: NotRequired[list[Annotated[list[str], Field(min_length=2, max_length=2)]]]
    slots: NotRequired[dict[str, _Slot]]


class _Consumed(TypedDict, total=False):
    steps: _Count
    samples: _Count
    tokens: _Count
    draws: _Count
    batches: _Count


class _Guard(TypedDict):
    version: NotRequired[int]
    losses: list[float]
    skips_in_a_row: _Count
    num_skipped_steps: _Count
    num_rows_left_out: _Count


class _LossScale(TypedDict):
    value: float
    num_quiet: _Count


class _Best(TypedDict):
    value: float | None
    step: _Count
    num_worse: _Count
    last_step: NotRequired[int]


class _Duration(TypedDict):
    unit: str
    count: _Count


class _Config(TypedDict, total=False):
    duration: _Duration


class State(TypedDict, total=False):
    """state.json; what a version did not write yet is not there."""

    version: int
    id: str
    state_version: int
    consumed: _Consumed
    num_updates: _Count
    num_rollbacks: _Count
    reached: list[str]
    stream: _Stream
    guard: _Guard
    loss_scale: _LossScale
    best: _Best
    stage: str
    seed: int
    model: dict[str, Any]
    config: _Config
    base: dict[str, str]
    files: dict[str, str]
    fingerprint: str
    start: dict[str, str]


class _Finished(TypedDict):
    checkpoint: str


class Rollback(TypedDict):
    """A line of rollbacks.jsonl. An older version wrote no id."""

    checkpoint: str
    checkpoint_id: NotRequired[str | None]
    first_batch: _Count
    last_batch: _Count
    attempt: _Count
    consumed: _Consumed
    stream: _Stream


def read_state(directory: Path) -> dict[str, Any]:
    """The state.json of a checkpoint; raises InputError where a value is not of its kind."""
    state: Any = read_as(directory / "state.json", State, _AGAIN)
    return dict(state)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint: its files, and what the ranks' files hold.

    Raises:
        InputError: it is damaged, or names a file that is not in the checkpoint's own directory.
    """
    file = directory / "manifest.json"
    manifest: Manifest = read_as(file, Manifest, _AGAIN)
    with os.scandir(directory) as entries:
        links = {entry.name for entry in entries if entry.is_symlink()}
    for name in [*manifest["files"], *manifest.get("ranks", [])]:
        if bare_name(name, file, "files") in links:
            raise InputError(f"{directory / name}: a link that leads out of the checkpoint; {_AGAIN}")
    return manifest


def read_slices(file: Path) -> dict[str, SliceEntry]:
    """The parameters that a safetensors file of a checkpoint holds some elements of."""
    where = f"{file}: its metadata, slices"
    text = read_header(file).metadata.get("slices")
    if text is None:
        raise InputError(f"{where}: missing; {_AGAIN}")
    found: dict[str, SliceEntry] = check(parse(text, where, _AGAIN), _SLICES, where, _AGAIN)
    return found


_SLICES: Any = dict[str, SliceEntry]


def read_rollbacks(directory: Path) -> list[dict[str, Any]]:
    """Every rollback of a stage, in order; raises InputError where a line is not of its kind."""
    return read_lines(directory / ROLLBACKS, Rollback)


def checkpoint_named(directory: Path) -> Path:
    """The checkpoint that a stage's finished.json names.

    Raises:
        InputError: it is damaged, or names what does not lie among the stage's checkpoints, by words or by a link.
    """
    file, root = directory / "finished.json", directory / "checkpoints"
    name = bare_name(read_as(file, _Finished, _AGAIN)["checkpoint"], file, "checkpoint")
    if (root / name).resolve() != root.resolve() / name:
        raise InputError(f"{root / name}: a link that leads out of {root}, and {file} names it; {_AGAIN}")
    return root / name
