"""One file of a DeepSpeed checkpoint: its content, and where in it the data of its tensors lie.

These files are pickles. They are read by `torch.load(weights_only=True)`, which builds tensors, plain values and the
few classes listed in `SAFE` (stand-ins that only store their arguments); any other name in a file raises an error.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.common.byte_ranges import ByteRange
from models.common.errors import InputError, single_line


class _Stage(int):
    """Replaces `ZeroStageEnum`."""


class _Held:
    """Replaces a class whose values are not used."""


SAFE: tuple[tuple[Any, str], ...] = (
    (_Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Held, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Held, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Held, "deepspeed.utils.tensor_fragment.fragment_address"),
)


class Pickle:
    """One pickle file. `value` is its content, with tensors without data; `run` gives the location of their data.

    The data are not compressed and are read directly: a mapped file's pages would count as memory while the map
    lives, and copying out of them costs as much as reading.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.value = _load(file)

    def run(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> ByteRange:
        """The byte range of elements [start, stop) of a tensor in `value`, by default of all."""
        if not tensor.is_contiguous():
            raise InputError(f"{self.file}: a tensor in it is not contiguous; save the checkpoint with DeepSpeed")
        begin = offset_of(tensor) + (int(tensor.storage_offset()) + start) * tensor.element_size()
        num_elements = (tensor.numel() if stop is None else stop) - start
        return ByteRange(self.file, begin, num_elements * tensor.element_size())


def offset_of(tensor: Tensor) -> int:
    """The offset of a tensor's storage in its file, which torch records when loading to the meta device."""
    offset: Any = tensor.untyped_storage()._checkpoint_offset
    return int(offset)


def _load(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals(list(SAFE)):
            return torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = named[1] if named else " ".join(str(error).split())[:200]
        raise InputError(f"{file}: it holds {what}, which is not unpickled; save the checkpoint without it") from error
    except Exception as error:  # of zip files, pickles and torch
        raise InputError(f"{file}: cannot be read ({single_line(error)}); copy it again") from error
