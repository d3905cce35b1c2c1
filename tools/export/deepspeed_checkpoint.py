"""Checkpoints that DeepSpeed itself has written (ZeRO 0 to 3), read weight by weight, without DeepSpeed.

    CHECKPOINT/latest                                     names the tag
    CHECKPOINT/TAG/*_model_states.pt                      shapes, frozen weights, buffers; under ZeRO-3 one a rank
    CHECKPOINT/TAG/*zero_pp_rank_R_mp_rank_00_optim_states.pt   the fp32 partitions of rank R

ZeRO 1 and 2 cut each flattened parameter group into one run a rank; ZeRO 3 cuts every parameter. Equal to
`deepspeed.utils.zero_to_fp32` bit for bit, whose memory is that of the model and more.

Reading a file is `tools.export.deepspeed_pickle`'s job.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.common.byte_ranges import ByteRange, read_runs
from models.common.documents import bare_name, understanding
from models.common.errors import InputError
from tools.export.deepspeed_pickle import Pickle, offset_of

MODEL_STATES, OPTIM_STATES = "*_model_states.pt", "*_optim_states.pt"

_MAX_NAME_BYTES = 1000


def is_deepspeed(path: Path) -> bool:
    """Whether the directory is a checkpoint of plain DeepSpeed, or one of its tags."""
    return _tag(path) is not None


def _tag(path: Path) -> Path | None:
    if any(path.glob(MODEL_STATES)):
        return path
    latest = path / "latest"
    if not latest.is_file():
        return None
    with latest.open("rb") as stream:
        name = bare_name(stream.read(_MAX_NAME_BYTES).decode(errors="replace").strip(), latest, "the tag")
    tag = path / name
    if not tag.is_dir():
        raise InputError(f"{tag}: no such directory, though {latest} names it; is the copy complete?")
    if tag.resolve() != path.resolve() / name:
        raise InputError(f"{tag}: a link that leads out of {path}, and {latest} names it; give its own directory")
    return tag


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of the flat fp32 tensor number `group` of a rank."""

    rank: int
    group: int
    start: int
    stop: int


class DeepSpeedCheckpoint:
    """A checkpoint of plain DeepSpeed: its weights by name, one at a time."""

    @classmethod
    def open(cls, path: Path) -> DeepSpeedCheckpoint:
        """Read the metadata in every rank's files, and locate the weights' pieces; no weight is read yet.

        Args:
            path: the checkpoint, or one of its tags.

        Raises:
            InputError: a rank's file is missing or damaged (named), or the ranks do not fit together.
        """
        tag = _tag(path)
        if tag is None:
            raise InputError(f"{path}: no {MODEL_STATES} in it, so it is no checkpoint of DeepSpeed")
        models, optim = ([Pickle(file) for file in _by_rank(tag, kind)] for kind in (MODEL_STATES, OPTIM_STATES))
        if any("mp_rank_00" not in pickled.file.name for pickled in models):
            raise InputError(f"{tag}: split by tensors too (mp_rank_01); merge those with DeepSpeed first")
        with understanding(tag, "is it a whole checkpoint of DeepSpeed? copy it again"):
            return cls(tag, models, optim)

    def __init__(self, directory: Path, models: list[Pickle], optim: list[Pickle]) -> None:
        self.directory, self._models, self._optim = directory, models, optim
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[Piece]] = {}
        self._shared: dict[str, str] = {}
        self.stage = int(self._state(0).get("zero_stage", 1)) if self._optim else 0
        self._key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        if self._optim:
            self._check_world()
            self._lay_out()
        self._list_others()

    def names(self) -> list[str]:
        """Every weight and buffer, and every second name of a shared one."""
        return [*self._shapes, *self.aliases]

    @property
    def trained(self) -> frozenset[str]:
        """The weights that had an optimizer's master copy; all of them where there is no ZeRO."""
        return frozenset(self._pieces) if self.stage > 0 else frozenset(self._shapes)

    @property
    def aliases(self) -> dict[str, str]:
        """Second names of shared parameters: {second name: name}."""
        shared = self._models[0].value.get("shared_params") or self._shared
        return {alias: name for alias, name in dict(shared).items() if name in self._shapes}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight of the model, whole again where ranks held parts."""
        return self._shapes[self.aliases.get(name, name)]

    def read(self, name: str) -> Tensor:
        """One weight: a trained one in fp32, a frozen one in its own dtype."""
        value = read_runs(self.runs(name), self.dtype(name), self.shape(name))
        return value.float() if self._is_buffer(name) and value.is_floating_point() else value

    def runs(self, name: str) -> list[ByteRange]:
        """The byte ranges of one weight, in order."""
        name = self.aliases.get(name, name)
        if name in self._pieces:
            files, flat_buffers = self._optim, [self._state(rank)[self._key] for rank in range(len(self._optim))]
            runs = [files[at.rank].run(flat_buffers[at.rank][at.group], at.start, at.stop) for at in self._pieces[name]]
        elif self.stage == 3 and name in self._fragments(self._models[0]):
            runs = [pickled.run(self._fragments(pickled)[name]) for pickled in self._models]
        else:
            runs = [self._models[0].run(self._held(name))]
        return _first_bytes(runs, math.prod(self._shapes[name]) * self.dtype(name).itemsize)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a weight is stored."""
        name = self.aliases.get(name, name)
        return torch.float32 if name in self._pieces else self._held(name).dtype

    def is_as_held(self, name: str) -> bool:
        """Whether a weight can be copied from its byte ranges; 16-bit buffers are converted to fp32."""
        return not self._is_buffer(name) or self.dtype(name) == torch.float32

    def _is_buffer(self, name: str) -> bool:
        return self.stage > 0 and name in self._models[0].value["buffer_names"]

    def _held(self, name: str) -> Tensor:
        """A weight that was not trained, or under ZeRO-3 the first rank's part of it."""
        found: Tensor = self._fragments(self._models[0]).get(name, self._models[0].value["module"].get(name))
        return found

    @staticmethod
    def _fragments(pickled: Pickle) -> dict[str, Tensor]:
        return pickled.value.get("frozen_param_fragments") or {}

    def _state(self, rank: int) -> dict[str, Any]:
        try:
            state: dict[str, Any] = self._optim[rank].value["optimizer_state_dict"]
        except (KeyError, TypeError) as error:
            raise InputError(f"{self._optim[rank].file}: no optimizer state of ZeRO in it") from error
        return state

    def _check_world(self) -> None:
        count = self._state(0).get("partition_count", len(self._optim))
        world_size = max(count) if isinstance(count, list) else int(count)
        wanted = {OPTIM_STATES: self._optim, **({MODEL_STATES: self._models} if self.stage == 3 else {})}
        for pattern, files in wanted.items():
            ranks = {_rank_of(pickled.file) for pickled in files}
            missing = sorted(set(range(world_size)) - ranks)
            if missing:
                name = re.sub(r"pp_rank_\d+", f"pp_rank_{missing[0]}", files[0].file.name)
                raise InputError(f"{self.directory / name}: missing; the checkpoint was made by {world_size} ranks")
            if len(files) != world_size:
                raise InputError(
                    f"{self.directory}: {len(files)} files {pattern}, though {world_size} ranks made it; "
                    "files of another checkpoint lie among them"
                )

    def _lay_out(self) -> None:
        """Locate the pieces of every trained weight; raises InputError where sizes and shapes do not match."""
        groups = self._models[0].value.get("param_shapes") or []
        flat_buffers = [self._state(rank)[self._key] for rank in range(len(self._optim))]
        if any(flat.dtype != torch.float32 for each in flat_buffers for flat in each):
            raise InputError(f"{self.directory}: the optimizer's copies are not in fp32; merge it with DeepSpeed")
        sizes = [[len(flat) for flat in each] for each in flat_buffers]
        if self.stage == 3:
            self._lay_out_stage_3({name: shape for group in groups for name, shape in group.items()}, sizes)
            return
        paddings = self._state(0).get("param_alignment_paddings")
        for number, group in enumerate(groups):
            bounds = [0, *accumulate(sizes[rank][number] for rank in range(len(sizes)))]
            offset = 0
            for place, (name, shape) in enumerate(group.items()):
                numel = math.prod(shape)
                self._shapes[name] = tuple(shape)
                self._pieces[name] = [
                    Piece(rank, number, max(offset, low) - low, min(offset + numel, high) - low)
                    for rank, (low, high) in enumerate(pairwise(bounds))
                    if max(offset, low) < min(offset + numel, high)
                ]
                offset += numel + (paddings[number][place] if paddings else 0)
            self._check_size(offset, bounds[-1], 2 * len(sizes))

    def _lay_out_stage_3(self, shapes: dict[str, Any], sizes: list[list[int]]) -> None:
        world_size, offset = len(sizes), 0
        for name, shape in shapes.items():
            share = math.ceil(math.prod(shape) / world_size)
            self._shapes[name] = tuple(shape)
            self._pieces[name] = [
                Piece(rank, number, max(offset, low) - low, min(offset + share, high) - low)
                for rank in range(world_size)
                for number, (low, high) in enumerate(_between(sizes[rank]))
                if max(offset, low) < min(offset + share, high)
            ]
            offset += share
        for rank in range(world_size):
            self._check_size(offset, sum(sizes[rank]), 1)

    def _check_size(self, wanted: int, found: int, align: int) -> None:
        if math.ceil(wanted / align) != math.ceil(found / align):
            raise InputError(
                f"{self.directory}: its shapes ask for {wanted} elements, its files hold {found}; "
                "are they of one checkpoint?"
            )

    def _list_others(self) -> None:
        """Collect untrained weights. ZeRO-3 leaves empty tensors in `module`; ZeRO-1 keeps frozen
        weights only there.
        """
        state = self._models[0].value
        frozen = state.get("frozen_param_shapes") or {}
        self._shapes.update({name: tuple(shape) for name, shape in frozen.items()})
        buffers = set(state.get("buffer_names") or ())
        shared = set(dict(state.get("shared_params") or {}))
        first: dict[tuple[int, int], str] = {}
        for name, value in state["module"].items():
            place = (offset_of(value), int(value.storage_offset()))
            if self.stage == 0 and value.numel() and first.setdefault(place, name) != name:
                self._shared[name] = first[place]
            elif name not in self._shapes and name not in shared and (value.numel() or name in buffers):
                self._shapes[name] = tuple(value.shape)


def _first_bytes(runs: list[ByteRange], num_bytes: int) -> list[ByteRange]:
    """The first `num_bytes` of the byte ranges; the rest is padding."""
    found = []
    for run in runs:
        found.append(ByteRange(run.file, run.start, min(run.num_bytes, num_bytes)))
        num_bytes -= found[-1].num_bytes
    return found


def _between(sizes: list[int]) -> Iterator[tuple[int, int]]:
    bounds = [0, *accumulate(sizes)]
    return pairwise(bounds)


def _by_rank(directory: Path, pattern: str) -> list[Path]:
    return sorted(directory.glob(pattern), key=_rank_of)


def _rank_of(file: Path) -> int:
    found = re.search(r"pp_rank_(\d+)", file.name)
    return int(found[1]) if found else 0
