"""Weights in torch's own files (`pytorch_model.bin`, `mm_projector.bin`): where each tensor's bytes lie.

The pickle is read by `torch.load(weights_only=True)` without the tensors' data: it builds tensors and plain values, and
any other name in it is an error. The bytes are then read as those of safetensors are (`models.common.byte_ranges`).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from models.common.documents import Text, bare_name, read_as
from models.common.errors import InputError, single_line
from models.common.sharded import StoredTensor, TensorFiles, has_tensor_files

INDEX = "pytorch_model.bin.index.json"
ENDINGS = (".bin", ".pt", ".pth")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "rng_state.bin")
_AGAIN = "fetch or copy it again"


class _Index(TypedDict):
    weight_map: dict[Text, Text]


def open_weights(directory: Path) -> TensorFiles:
    """The tensors of a model directory: those of its safetensors, or where it has none of its .bin files.

    Raises InputError as `TensorFiles.open` and `tensors_in` do.
    """
    if has_tensor_files(directory) or not _files(directory):
        return TensorFiles.open(directory)
    stored: dict[str, StoredTensor] = {}
    for file in _files(directory):
        for name, tensor in tensors_in(file).items():
            if name in stored:
                raise InputError(f"{file}: {name} stands in {stored[name].file.name} too; remove one of them")
            stored[name] = tensor
    return TensorFiles(directory, stored)


def open_file(file: Path) -> TensorFiles:
    """The tensors of one file, safetensors or torch's; raises InputError where it is neither, or not there."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; give a .safetensors or .bin with weights")
    return TensorFiles(file, tensors_in(file)) if file.suffix in ENDINGS else TensorFiles.of_file(file)


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        names = sorted(
            {bare_name(name, index, "weight_map") for name in read_as(index, _Index, _AGAIN)["weight_map"].values()}
        )
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise InputError(f"{directory / missing[0]}: missing ({INDEX} names {len(names)} files); fetch it again")
        return [directory / name for name in names]
    return sorted(file for file in directory.glob("*.bin") if file.name not in _NOT_WEIGHTS)


def tensors_in(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, each known to lie within it.

    Raises:
        InputError: it holds something else than tensors by name, or cannot be read.
    """
    content, num_bytes = _load(file), file.stat().st_size
    if not isinstance(content, Mapping):
        raise InputError(f"{file}: holds {type(content).__name__}, where tensors by name are expected; {_AGAIN}")
    found = {str(name): _stored(file, str(name), value) for name, value in content.items()}
    for name, tensor in found.items():
        if tensor.start + tensor.num_bytes > num_bytes:
            raise InputError(f"{file}: cut short before the end of {name}; {_AGAIN}")
    return found


def _stored(file: Path, name: str, value: Any) -> StoredTensor:
    if not isinstance(value, Tensor):
        raise InputError(f"{file}: {name} is {type(value).__name__}, where a tensor is expected; {_AGAIN}")
    storage: Any = value.untyped_storage()
    offset = getattr(storage, "_checkpoint_offset", None)
    if offset is None or not value.is_contiguous():
        raise InputError(
            f"{file}: {name} is stored as torch did before 1.6, or not in one piece; save it as safetensors"
        )
    start = int(offset) + int(value.storage_offset()) * value.element_size()
    return StoredTensor(file, start, value.numel() * value.element_size(), value.dtype, tuple(value.shape))


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = named[1] if named else single_line(error, 200)
        raise InputError(f"{file}: it holds {what}, which is not unpickled; save the weights as safetensors") from error
    except Exception as error:  # of zip files, pickles and torch
        raise InputError(f"{file}: cannot be read ({single_line(error)}); {_AGAIN}") from error
