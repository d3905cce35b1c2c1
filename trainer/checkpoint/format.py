"""Checkpoints: complete or absent, and independent of the ZeRO stage and of the number of ranks that wrote them.

    checkpoints/step_000500/
        rank_00000_of_00002.safetensors   weight, exp_avg, exp_avg_sq: this rank's slices end to end, fp32
        slices.npy                        which elements of which parameters the ranks' files hold (`slices`)
        given.safetensors                 inherited weights: they came from an earlier stage and are not trained here;
                                          under ZeRO-3 the first rank's elements, those of rank 1 in given_00001, ...
        state.json                        its id, what was consumed, the stream's state, the stage, the base's digests
        manifest.json                     size and sha256 of each file, shapes of the parameters
        COMMIT                            written last; without it the directory is ignored

Every file is fsynced in a hidden sibling directory, which is renamed at the end. Reading needs neither DeepSpeed nor a
process group. Version 1 had no slices.npy: a rank's file held a tensor for each slice and said so in its header.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from models.common.errors import InputError
from models.common.files import rename_durably, sync, write_json
from models.common.sharded import read_header
from models.common.source import sha256_of
from trainer.checkpoint.records import FileEntry, read_manifest
from trainer.checkpoint.slices import SLICES_FILE, Slice, pack, tabulate
from trainer.distributed.context import DistributedContext

VERSION = 2
READABLE = (1, 2)
COMMIT = "COMMIT"
WEIGHT = "weight"
INHERITED_FILE = "given.safetensors"
_NAME = re.compile(r"step_([0-9]+)")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a flattened parameter and of its Adam moments: views of this rank's memory."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    weight: Tensor
    """[numel]"""
    moments: dict[str, Tensor]
    """By Adam's name, each [numel]; empty before the first step."""


@dataclass(frozen=True)
class FileContent:
    """What one safetensors file holds."""

    tensors: dict[str, Tensor]
    """Flat, on the host: KIND of a rank's slices, KIND/PARAMETER of inherited weights. KIND is `WEIGHT` or a moment."""
    slices: tuple[Slice, ...] | None = None
    """What a rank's tensors are, end to end; None for a file that says it itself."""
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RankShard:
    """What one rank writes of a checkpoint, by file name."""

    files: dict[str, FileContent]

    def write(self, directory: Path) -> dict[str, Any]:
        """Write the files and push them to the disk.

        Returns:
            Their entries for the manifest.

        Raises:
            OSError: the disk is full or a write fails.
        """
        directory.mkdir(parents=True, exist_ok=True)
        entries: dict[str, Any] = {}
        for name, content in self.files.items():
            file = directory / name
            try:
                save_file(content.tensors, file, metadata=content.metadata or None)
            except (SafetensorError, RuntimeError) as error:  # how safetensors reports a full disk
                raise OSError(f"{file}: {error}") from error
            entries[name] = _entry(file)
            if content.slices is not None:
                stored = read_header(file).tensors
                entries[name]["kinds"] = {kind: tensor.start for kind, tensor in stored.items()}
                entries[name]["slices"] = pack(content.slices)
        return entries


def take_rank_shard(
    fragments: Iterable[Fragment],
    inherited: Sequence[Fragment],
    ranks: DistributedContext,
    buffers: dict[str, Tensor],
) -> RankShard:
    """Copy what this rank writes, so that training may continue.

    Args:
        inherited: what this rank writes of weights from an earlier stage that are not trained here, so they are not
            copied: the first rank whole ones, every rank its elements of divided ones.
        buffers: the copies' memory, filled here and used again by the next save: the system takes longer to give new
            pages than to copy into old ones. Pinned where the fragments are on a GPU.
    """
    held = list(fragments)
    tensors = {kind: _end_to_end(held, kind, buffers) for kind in _kinds(held)}
    if any(copy.is_pinned() for copy in tensors.values()):
        torch.cuda.synchronize()
    slices = tuple(Slice(each.name, each.shape, each.start, each.weight.numel()) for each in held)
    files = {f"rank_{ranks.rank:05d}_of_{ranks.world_size:05d}.safetensors": FileContent(tensors, slices)}
    if inherited:
        said = {each.name: {"start": each.start, "shape": list(each.shape)} for each in inherited}
        files[INHERITED_FILE if ranks.is_first else f"given_{ranks.rank:05d}.safetensors"] = FileContent(
            {f"{WEIGHT}/{each.name}": each.weight.detach().cpu().reshape(-1) for each in inherited},
            metadata={"slices": json.dumps(said)},
        )
    return RankShard(files)


def _kinds(fragments: list[Fragment]) -> list[str]:
    """Weights, and the moments that any fragment has."""
    return [WEIGHT, *sorted({kind for each in fragments for kind in each.moments})] if fragments else []


def _end_to_end(fragments: list[Fragment], kind: str, buffers: dict[str, Tensor]) -> Tensor:
    """One kind of all fragments in one host tensor, fp32; a moment that Adam has not made yet is zero."""
    total = sum(each.weight.numel() for each in fragments)
    if kind not in buffers or buffers[kind].numel() != total:
        buffers[kind] = torch.empty(total, pin_memory=any(each.weight.is_cuda for each in fragments))
    place = 0
    for each in fragments:
        part = buffers[kind].narrow(0, place, each.weight.numel())
        values = each.weight if kind == WEIGHT else each.moments.get(kind)
        if values is None:
            part.zero_()
        else:
            part.copy_(values.detach().view(-1), non_blocking=True)
        place += len(part)
    return buffers[kind]


def name_of(step: int) -> str:
    """The directory of the checkpoint after `step` optimizer steps."""
    return f"step_{step:06d}"


def step_of(name: str) -> int:
    """The step that a checkpoint's directory is named after; -1 where it is not the name of one."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found is not None else -1


def checkpoints_in(root: Path) -> list[Path]:
    """Every directory in `root` that is named as a checkpoint, sound or not, by its step as a number, oldest first.

    Names do not sort as steps do from 1,000,000 on: whoever orders checkpoints asks here.
    """
    return sorted(
        (path for path in root.glob("step_*") if step_of(path.name) >= 0), key=lambda path: step_of(path.name)
    )


def commit(temporary: Path, final: Path, state: dict[str, Any], files: dict[str, Any]) -> None:
    """Complete a checkpoint: add state, manifest and COMMIT to what the ranks wrote, and give the directory its name.

    A complete checkpoint of that name is kept: it holds the same state, and may be being read.

    Args:
        temporary: where all ranks have written their files; a hidden sibling of `final`.
        state: goes to state.json, with the format's version and an id that no other checkpoint has.
        files: the manifest entries of all ranks' files; those of state.json and of the table of slices are added.

    Raises:
        OSError: the disk is full or a write fails. `final` is unchanged.
    """
    write_json(temporary / "state.json", {"version": VERSION, "id": secrets.token_hex(16), **state})
    files["state.json"] = _entry(temporary / "state.json")
    ranked, shapes, rows = tabulate({name: entry.pop("slices") for name, entry in files.items() if "slices" in entry})
    np.save(temporary / SLICES_FILE, rows)
    files[SLICES_FILE] = _entry(temporary / SLICES_FILE)
    write_json(temporary / "manifest.json", {"version": VERSION, "files": files, "ranks": ranked, "parameters": shapes})
    (temporary / COMMIT).touch()
    sync(temporary / COMMIT)
    sync(temporary)
    if final.is_dir():
        if fault_of(final) is None:
            shutil.rmtree(temporary)
            return
        shutil.rmtree(final)
    rename_durably(temporary, final)


def _entry(file: Path) -> dict[str, Any]:
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


Stamp = frozenset[tuple[str, int, int]]
"""Name, size and time of change of each file of a checkpoint."""


def stamp_of(directory: Path) -> Stamp:
    """Tells whether a checkpoint was changed since it was verified, without reading it."""
    stats = [(file, file.stat()) for file in directory.glob("*")]
    return frozenset((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats)


def remove_old(root: Path, keep: int, spare: Collection[str] = (), sound: set[Stamp] | None = None) -> None:
    """Remove checkpoints older than the newest `keep` sound ones, and the remains of interrupted writes.

    A damaged one does not count among those that are kept; it goes when it is older than they are.

    No checkpoint may be in progress in `root` meanwhile: its files would be removed as remains.

    Args:
        spare: names of checkpoints that are kept however old they are.
        sound: checkpoints that need not be verified again; those that are verified here are added.
    """
    sound = set() if sound is None else sound
    for temporary in root.glob(".step_*.tmp"):
        shutil.rmtree(temporary, ignore_errors=True)
    num_sound = 0
    for path in reversed(checkpoints_in(root)):
        if num_sound >= keep:
            if path.name not in spare:
                shutil.rmtree(path, ignore_errors=True)
        elif (stamp := stamp_of(path)) in sound or fault_of(path) is None:
            sound.add(stamp)
            num_sound += 1


def fault_of(directory: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Why a checkpoint is not complete, or None where it is.

    Complete means that COMMIT exists and every file of the manifest is unchanged, by its sha256.

    Args:
        share: (k, n): look at the k-th of n shares of the files, about as many bytes in each; all of them by default.
    """
    if not (directory / COMMIT).is_file():
        return "it has no COMMIT, so its writing was broken off"
    try:
        files = read_manifest(directory)["files"]
    except (InputError, OSError) as error:
        return f"its manifest cannot be used ({error})"
    if "state.json" not in files:
        return "its manifest lacks state.json"
    try:
        faults = (_file_fault(directory / name, entry) for name, entry in _share(files, *share))
        return next((fault for fault in faults if fault), None)
    except OSError as error:
        return f"it cannot be read ({error})"


def _share(files: dict[str, FileEntry], place: int, num_shares: int) -> list[tuple[str, FileEntry]]:
    """Every n-th file by size, so that no share is much larger than another."""
    return sorted(files.items(), key=lambda item: (-item[1]["bytes"], item[0]))[place::num_shares]


def _file_fault(file: Path, entry: FileEntry) -> str:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != entry["bytes"]:
        return f"{file.name} has {file.stat().st_size} bytes, not {entry['bytes']}"
    return "" if sha256_of(file) == entry["sha256"] else f"{file.name} has changed since it was written"


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint in a directory of checkpoints.

    Returns:
        It, or None where there is none; and for each newer one why it was skipped.
    """
    skipped: list[str] = []
    for directory in reversed(checkpoints_in(root)):
        fault = fault_of(directory)
        if fault is None:
            return directory, skipped
        skipped.append(f"{directory}: {fault}")
    return None, skipped
