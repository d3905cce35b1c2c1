"""Reading a committed checkpoint on any number of ranks, without DeepSpeed or a process group.

fill: many slices at once, each file opened once and read front to back     what a rank restores
read, weight: one slice                                                     what merging reads, tensor by tensor
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.common.errors import InputError
from trainer.checkpoint.format import COMMIT, READABLE, WEIGHT, fault_of
from trainer.checkpoint.layout import Layout, Wanted, read_layout
from trainer.checkpoint.piecewise import read_pieces
from trainer.checkpoint.records import read_manifest, read_state


class CheckpointReader:
    """A committed checkpoint; memory is bounded by what is asked for. `open` makes one."""

    def __init__(self, directory: Path, state: dict[str, Any], layout: Layout) -> None:
        self.directory = directory
        self.state = state
        """The content of state.json."""
        self._layout = layout

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True) -> CheckpointReader:
        """Verify every file of a checkpoint and read where its slices are.

        Args:
            verify: hash the files; not where `trainer.checkpoint.verify` does it for all ranks.

        Raises:
            InputError: it is incomplete, damaged, or of another version of the format.
        """
        is_committed = (directory / COMMIT).is_file()
        fault = fault_of(directory) if verify or not is_committed else None
        if fault is not None:
            raise InputError(f"{directory}: {fault}; use another checkpoint")
        state = read_state(directory)
        if state.get("version") not in READABLE:
            raise InputError(f"{directory}: version {state.get('version')}, this program reads {READABLE[-1]}")
        try:
            layout = read_layout(directory, read_manifest(directory))
        except OSError as error:
            raise InputError(f"{directory}: it cannot be read ({error}); use another checkpoint") from error
        return cls(directory, state, layout)

    def part(self, key: str) -> Any:
        """A value of state.json; raises InputError where it is missing."""
        if key not in self.state:
            raise InputError(f"{self.directory / 'state.json'}: {key}: missing; use another checkpoint")
        return self.state[key]

    def names(self) -> list[str]:
        """Every parameter in it, trained or inherited."""
        return list(self._layout.shapes)

    def without(self, beginning: str, part_of_name: str) -> CheckpointReader:
        """The same checkpoint without the parameters whose names begin so and hold `part_of_name`."""
        shapes = {
            name: shape
            for name, shape in self._layout.shapes.items()
            if not (name.startswith(beginning) and part_of_name in name)
        }
        return CheckpointReader(self.directory, self.state, replace(self._layout, shapes=shapes))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        return self._layout.shapes[name]

    def fill(self, kind: str, targets: Sequence[tuple[str, int, Tensor]]) -> None:
        """Read slices of weights or moments into tensors, each file that holds some of them once.

        Args:
            kind: `WEIGHT` or the name of a moment.
            targets: parameter, first element in it when flattened, and a flat contiguous tensor, which is filled; of
                any dtype and on any device.

        Raises:
            InputError: no file holds some of the elements.
        """
        wanted = [Wanted(name, start, values.numel()) for name, start, values in targets]
        pieces = self._layout.pieces(kind, wanted, self.directory)
        read_pieces(self._layout.files, pieces, [values for _, _, values in targets])

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened weight or moment, fp32. Raises InputError as `fill` does."""
        values = torch.empty(numel)
        self.fill(kind, [(name, start, values)])
        return values

    def weight(self, name: str) -> Tensor:
        """A whole parameter in its shape, fp32. Raises InputError as `fill` does."""
        if name not in self._layout.shapes:
            raise InputError(f"{self.directory}: it does not hold {name}; use another checkpoint")
        shape = self.shape(name)
        return self.read(WEIGHT, name, 0, int(torch.Size(shape).numel())).view(shape)
