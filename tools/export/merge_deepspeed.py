"""A checkpoint of plain DeepSpeed -> a model directory: the same as its own zero_to_fp32, or merged into the base.

without a base: every weight of the checkpoint under its own name, trained ones in fp32
with a base:    the base's names, dtypes, config and tokenizer; peft's adapters merged in fp32

A directory made so has no sightline.json: DeepSpeed's files contain neither recipe nor prompts, so only the weights
themselves can be compared.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from models.common.errors import InputError
from models.common.files import new_directory
from models.common.source import directory_of

if TYPE_CHECKING:
    from torch import Tensor

    from models.common.sharded import ShardedWriter, TensorFiles
    from tools.export.deepspeed_checkpoint import DeepSpeedCheckpoint

_ADAPTER = re.compile(r"^(.*)\.lora_([AB])\.[^.]+\.weight$")


def merge_plain(path: Path, out: Path, *, base: Path | None, lora_alpha: float | None) -> str:
    """Write `out`; returns one line about its content. Raises InputError, naming file or weight, on a mismatch."""
    from tqdm import tqdm

    from models.common.sharded import ShardedWriter, TensorFiles
    from tools.export.deepspeed_checkpoint import DeepSpeedCheckpoint

    checkpoint = DeepSpeedCheckpoint.open(path)
    is_adapted = any(_ADAPTER.match(name) for name in checkpoint.names())
    if is_adapted and (base is None or lora_alpha is None):
        raise InputError(f"{checkpoint.directory}: it holds LoRA adapters; give --base DIR and --lora-alpha ALPHA")
    described = {"desc": f"ZeRO-{checkpoint.stage}", "unit": "tensor"}
    num_written = 0
    with new_directory(out) as directory:
        writer = ShardedWriter(directory)
        if base is None:
            for name in tqdm([name for name in checkpoint.names() if name not in checkpoint.aliases], **described):
                _copy(checkpoint, name, writer)
                num_written += 1
        else:
            files = TensorFiles.open(directory_of(str(base)))
            tensors = _over(checkpoint, files, lora_alpha or 0.0)
            for name, value in tqdm(tensors, total=len(list(files)), **described):
                writer.add(name, value)
                num_written += 1
        writer.close()
        if base is not None:
            _copy_rest(directory_of(str(base)), directory)
    return f"{out}: {num_written} tensors of {checkpoint.directory}"


def _copy(checkpoint: DeepSpeedCheckpoint, name: str, writer: ShardedWriter) -> None:
    """Copy a weight unchanged."""
    if checkpoint.is_as_held(name):
        writer.copy(name, checkpoint.runs(name), checkpoint.dtype(name), checkpoint.shape(name))
    else:
        writer.add(name, checkpoint.read(name))


def _over(checkpoint: DeepSpeedCheckpoint, base: TensorFiles, alpha: float) -> Iterator[tuple[str, Tensor]]:
    """The base's tensors, replaced or adapted by the checkpoint's, in the base's dtypes.

    A frozen weight that the checkpoint holds must be the base's own, and every weight in it must have a counterpart.
    """
    import torch

    adapters, weights = _sorted_names(checkpoint)
    trained, used = set(checkpoint.trained), set[str]()
    for name in base:
        value, mine = base.read(name), weights.get(name)
        if mine is not None:
            if checkpoint.shape(mine) != tuple(value.shape):
                raise InputError(
                    f"{base.directory}: {name} has shape {tuple(value.shape)}, trained was {checkpoint.shape(mine)}"
                )
            held = checkpoint.read(mine)
            if mine in trained:
                value = held.to(value.dtype)
            elif not torch.equal(held, value.to(held.dtype)):
                raise InputError(
                    f"{base.directory}: {name} is not what {checkpoint.directory} was trained on; another base?"
                )
            used.add(name)
        stem = name.removesuffix(".weight")
        if stem in adapters:
            down, up = (checkpoint.read(adapters[stem][side]) for side in "AB")
            value = value.float().addmm_(up.float(), down.float(), alpha=alpha / down.shape[0]).to(value.dtype)
            used.add(stem)
        yield name, value
    tied = {alias for alias, name in checkpoint.aliases.items() if name in weights.values()}
    lost = (set(adapters) | {name for name, mine in weights.items() if mine not in tied and mine in trained}) - used
    if lost:
        raise InputError(f"{base.directory}: no place for {min(lost)}, which was trained; is it another base?")


def _sorted_names(checkpoint: DeepSpeedCheckpoint) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """({module: {"A": name, "B": name}}, {the base's name: name}) of a checkpoint, peft's wrapping taken off."""
    adapters: dict[str, dict[str, str]] = {}
    weights: dict[str, str] = {}
    for name in checkpoint.names():
        plain = name.removeprefix("base_model.model.")
        if found := _ADAPTER.match(plain):
            adapters.setdefault(found[1], {})[found[2]] = name
        else:
            plain = re.sub(r"\.modules_to_save\.[^.]+\.", ".", plain.replace(".base_layer.", "."))
            if ".original_module." not in plain:
                weights[plain] = name
    return adapters, weights


def _copy_rest(base: Path, directory: Path) -> None:
    for file in base.iterdir():
        is_weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")
        if file.is_file() and not is_weights and not file.name.endswith(".index.json"):
            shutil.copy2(file, directory / file.name)
