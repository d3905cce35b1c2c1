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
from collections.abc import Iterable, Iterator
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


def write_checkpoint(
    root: Path,
    step: int,
    *,
    fragments: Iterable[Fragment],
    given: dict[str, Tensor],
    state: dict[str, Any],
    ranks: Ranks,
) -> Path:
    """Write `root/step_NNNNNN` together with all ranks; its path. Every rank must call it at the same step.

    Raises OSError on every rank where any of them could not write (a full disk, say); older checkpoints stay.
    """
    final = root / f"step_{step:06d}"
    temporary = root / f".{final.name}.tmp"
    if ranks.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    digests, fault = _write_share(temporary, fragments, given if ranks.is_first else {}, ranks)
    answers = ranks.gather((digests, fault))
    faults = [f"rank {rank}: {fault}" for rank, (_, fault) in enumerate(answers) if fault]
    if not faults and ranks.is_first:
        files = {name: entry for share, _ in answers for name, entry in share.items()}
        try:
            _commit(temporary, final, state, files)
        except OSError as error:
            faults = [str(error)]
    faults = [fault for fault_list in ranks.gather(faults) for fault in fault_list]
    if faults:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"checkpoint {final.name} not written: {'; '.join(faults)}")
    return final


def _write_share(
    directory: Path, fragments: Iterable[Fragment], given: dict[str, Tensor], ranks: Ranks
) -> tuple[dict[str, Any], str]:
    """This rank's files: their manifest entries, and what went wrong, if anything did."""
    tensors: dict[str, Tensor] = {}
    slices: dict[str, Any] = {}
    for fragment in fragments:
        slices[fragment.name] = {"start": fragment.start, "shape": list(fragment.shape)}
        for kind, values in ((WEIGHT, fragment.weight), *fragment.moments.items()):
            tensors[f"{kind}/{fragment.name}"] = values.detach().to("cpu", copy=True).contiguous()
    whole = {name: {"start": 0, "shape": list(value.shape)} for name, value in given.items()}
    flat = {f"{WEIGHT}/{name}": value.detach().to("cpu", copy=True).reshape(-1) for name, value in given.items()}
    shares = [(f"rank_{ranks.rank:05d}_of_{ranks.world_size:05d}.safetensors", tensors, slices)]
    if given:
        shares.append(("given.safetensors", flat, whole))
    entries: dict[str, Any] = {}
    try:
        for name, contents, layout in shares:
            save_file(contents, directory / name, metadata={"slices": json.dumps(layout)})
            entries[name] = _entry(directory / name)
    except (OSError, RuntimeError) as error:  # safetensors raises its own kind on a full disk
        return entries, str(error)
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        return entries, str(error)
    return entries, ""


def _commit(temporary: Path, final: Path, state: dict[str, Any], files: dict[str, Any]) -> None:
    write_json(temporary / "state.json", {"version": VERSION, **state})
    files["state.json"] = _entry(temporary / "state.json")
    write_json(temporary / "manifest.json", {"version": VERSION, "files": files})
    (temporary / COMMIT).touch()
    sync(temporary / COMMIT)
    sync(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync(final.parent)


def _entry(file: Path) -> dict[str, Any]:
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def remove_old(root: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints, and clear what broken-off writes left behind."""
    for temporary in root.glob(".step_*.tmp"):
        shutil.rmtree(temporary, ignore_errors=True)
    for old in sorted(root.glob("step_*"))[:-keep]:
        shutil.rmtree(old)


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
