"""Checkpoints: complete or absent, and free of the ZeRO stage and the number of ranks that wrote them.

    checkpoints/step_000500/
        rank_00000_of_00002.safetensors   slices of trained weights and Adam moments, flat, fp32
        given.safetensors                 weights that came from the stage before and do not learn here
        state.json                        what was consumed, the stream's state, the stage, the base's digests
        manifest.json                     size and sha256 of each file
        COMMIT                            written last; without it the directory counts for nothing

Every file is fsynced in a hidden sibling directory, which is renamed at the end. Reading needs neither DeepSpeed nor a
process group.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.errors import InputError
from models.files import sync, write_json
from models.source import read_json, sha256_of
from trainer.ranks import Ranks

VERSION = 1
COMMIT = "COMMIT"
WEIGHT = "weight"


@dataclass(frozen=True)
class Fragment:
    """A slice [start, start + numel) of a flattened parameter: its weight and its moments, as views on this rank."""

    name: str
    shape: tuple[int, ...]
    start: int
    weight: Tensor
    moments: dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where a slice of a parameter lies: a file, and [start, stop) of the flattened parameter."""

    file: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Share:
    """What one rank writes: for each file its flat tensors on the host, and where their slices lie."""

    files: dict[str, tuple[dict[str, Tensor], dict[str, Any]]]

    def write(self, directory: Path) -> dict[str, Any]:
        """Write and fsync the files; their manifest entries. Raises OSError where the disk refuses."""
        directory.mkdir(parents=True, exist_ok=True)
        entries: dict[str, Any] = {}
        for name, (tensors, slices) in self.files.items():
            try:
                save_file(tensors, directory / name, metadata={"slices": json.dumps(slices)})
            except Exception as error:  # safetensors raises kinds of its own on a full disk
                if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
                    raise OSError(f"{directory / name}: {error}") from error
                raise
            entries[name] = _entry(directory / name)
        return entries


def take_share(
    fragments: Iterable[Fragment], given: dict[str, Tensor], ranks: Ranks, buffers: dict[str, Tensor]
) -> Share:
    """Copy what this rank writes, so that training may go on; what is given does not change and is not copied.

    The copies lie in `buffers`, which the next save uses again: memory that is new costs more than copying into it.
    """
    tensors: dict[str, Tensor] = {}
    slices: dict[str, Any] = {}
    for fragment in fragments:
        slices[fragment.name] = {"start": fragment.start, "shape": list(fragment.shape)}
        for kind, values in ((WEIGHT, fragment.weight), *fragment.moments.items()):
            name = f"{kind}/{fragment.name}"
            if name not in buffers:
                buffers[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            tensors[name] = buffers[name].copy_(values.detach(), non_blocking=True)
    if any(copy.is_pinned() for copy in tensors.values()):
        torch.cuda.synchronize()
    files = {f"rank_{ranks.rank:05d}_of_{ranks.world_size:05d}.safetensors": (tensors, slices)}
    if given and ranks.is_first:
        whole = {name: {"start": 0, "shape": list(value.shape)} for name, value in given.items()}
        flat = {f"{WEIGHT}/{name}": value.detach().cpu().reshape(-1) for name, value in given.items()}
        files["given.safetensors"] = (flat, whole)
    return Share(files)


def name_of(step: int) -> str:
    """The directory of the checkpoint after `step` optimizer steps."""
    return f"step_{step:06d}"


def commit(temporary: Path, final: Path, state: dict[str, Any], files: dict[str, Any]) -> None:
    """Add state, manifest and COMMIT to the files of all ranks, and give the directory its name.

    A sound checkpoint of that name stays as it is: it holds the same state, and a reader may be at it.
    """
    write_json(temporary / "state.json", {"version": VERSION, **state})
    files["state.json"] = _entry(temporary / "state.json")
    write_json(temporary / "manifest.json", {"version": VERSION, "files": files})
    (temporary / COMMIT).touch()
    sync(temporary / COMMIT)
    sync(temporary)
    if final.is_dir():
        if fault_of(final) is None:
            shutil.rmtree(temporary)
            return
        shutil.rmtree(final)
    temporary.rename(final)
    sync(final.parent)


def _entry(file: Path) -> dict[str, Any]:
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def remove_old(root: Path, keep: int, spare: Collection[str] = ()) -> None:
    """Keep the newest `keep` checkpoints and those named in `spare`; clear what broken-off writes left behind."""
    for temporary in root.glob(".step_*.tmp"):
        shutil.rmtree(temporary, ignore_errors=True)
    for old in sorted(root.glob("step_*"))[:-keep]:
        if old.name not in spare:
            shutil.rmtree(old, ignore_errors=True)


def fault_of(directory: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None: COMMIT there, every file of the manifest whole and unchanged."""
    if not (directory / COMMIT).is_file():
        return "it has no COMMIT, so its writing was broken off"
    try:
        files = read_json(directory, "manifest.json")["files"]
    except (InputError, KeyError) as error:
        return f"its manifest cannot be read ({error})"
    for name, entry in files.items():
        file = directory / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
        if sha256_of(file) != entry["sha256"]:
            return f"{name} has changed since it was written"
    return None


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was passed over."""
    passed_over: list[str] = []
    for directory in sorted(root.glob("step_*"), reverse=True):
        fault = fault_of(directory)
        if fault is None:
            return directory, passed_over
        passed_over.append(f"{directory}: {fault}")
    return None, passed_over


class CheckpointReader:
    """A committed checkpoint, read slice by slice: memory is bounded by what is asked for."""

    def __init__(self, directory: Path) -> None:
        fault = fault_of(directory)
        if fault is not None:
            raise InputError(f"{directory}: {fault}; use another checkpoint")
        self.directory = directory
        self.state = read_json(directory, "state.json")
        if self.state.get("version") != VERSION:
            raise InputError(f"{directory}: version {self.state.get('version')}, this program reads {VERSION}")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[Place]] = {}
        for file in sorted(directory.glob("*.safetensors")):
            self._index(file)

    def _index(self, file: Path) -> None:
        with safe_open(file, framework="pt") as opened:
            slices = json.loads((opened.metadata() or {})["slices"])
            for name, place in slices.items():
                numel = opened.get_slice(f"{WEIGHT}/{name}").get_shape()[0]
                self._shapes[name] = tuple(place["shape"])
                self._places.setdefault(name, []).append(Place(file, place["start"], place["start"] + numel))

    def names(self) -> list[str]:
        """Every parameter in it, trained or given."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole parameter's shape."""
        return self._shapes[name]

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened weight or moment, wherever their slices lie."""
        values = torch.empty(numel)
        filled = 0
        for place, low, high in self._overlaps(name, start, start + numel):
            with safe_open(place.file, framework="pt") as opened:
                piece = opened.get_slice(f"{kind}/{name}")[low - place.start : high - place.start]
            values[low - start : high - start] = piece
            filled += high - low
        if filled != numel:
            raise InputError(
                f"{self.directory}: {kind} of {name} has {filled} of {numel} elements; a rank's file is missing"
            )
        return values

    def weight(self, name: str) -> Tensor:
        """A whole parameter in fp32, in its shape."""
        shape = self._shapes[name]
        return self.read(WEIGHT, name, 0, int(torch.Size(shape).numel())).view(shape)

    def _overlaps(self, name: str, start: int, stop: int) -> Iterator[tuple[Place, int, int]]:
        for place in self._places[name]:
            low, high = max(start, place.start), min(stop, place.stop)
            if low < high:
                yield place, low, high
