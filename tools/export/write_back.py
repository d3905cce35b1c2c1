"""A merged published model in the very layout it came from: names, dtypes, side files.

    a tensor that was not trained  --its bytes--------------------> the same name
    one that was                   --merged, in the file's dtype--> the same name
    config, tokenizer, processor   --copied----------------------> the same files

Whatever opened the published model opens what was trained from it. Does not own merging (`tools.export.merge`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models.bundle import NAME, Precision
from models.common.byte_ranges import ByteRange
from models.common.documents import read_json
from models.common.files import write_json
from models.common.pickled import open_weights
from models.common.sharded import ShardedWriter
from models.opening import open_processor
from models.published.names import place_of
from models.spec import ImageFit
from tools.export.merging import PREFIXES, PartMerge

if TYPE_CHECKING:
    from tools.export.reference import Trained

_PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_COARSENESS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
"""From the finest on."""

_LEFT_OUT = (NAME, "README.md", "LICENSE", "adapter_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf", ".onnx", ".index.json")


def write_back(trained: Trained, layout: Path, directory: Path, precision: Precision) -> Precision:
    """Write all tensors of `layout` to `directory`, with what was trained in them.

    Args:
        precision: that the stage was trained in.

    Returns:
        The coarser of that and the files' own: what the bundle is compared by.

    Raises:
        InputError: a trained weight has no place in the files.
    """
    files, writer = open_weights(layout), ShardedWriter(directory)
    merges = {part: PartMerge(trained, part) for part in PREFIXES}
    is_tied = bool(getattr(trained.language.config, "tie_word_embeddings", False))
    for raw in files:
        stored, place = files.stored(raw), place_of(raw)
        part, name = place if place is not None else ("", "")
        if is_tied and part == "language" and name == "lm_head.weight":
            name = "model.embed_tokens.weight"  # some files have the copy as well
        if part and merges[part].changes(name):
            writer.add(raw, merges[part].merged(name, files.read(raw)).to(stored.dtype))
        else:
            writer.copy(raw, [ByteRange(stored.file, stored.start, stored.num_bytes)], stored.dtype, stored.shape)
    writer.close()
    for each in merges.values():
        each.check_complete(str(layout))
    dtypes = {files.stored(raw).dtype for raw in files}
    found = [precision, *(_PRECISIONS[dtype] for dtype in dtypes if dtype in _PRECISIONS)]
    return max(found, key=_COARSENESS.index)


def copy_side_files(layout: Path, directory: Path, template: str, stop: int) -> None:
    """Copy everything but weights and manifest; a recipe's own chat template replaces the published one.

    Args:
        template: of training, in Jinja.
        stop: the token that ends an answer in training; generation must know it.
    """
    for file in sorted(layout.iterdir()):
        is_left_out = file.name.startswith(".") or file.name in _LEFT_OUT or file.name.endswith(_WEIGHTS)
        if file.is_file() and not is_left_out:
            shutil.copyfile(file, directory / file.name)
    if template != open_processor(layout).chat_template:
        (directory / "chat_template.json").unlink(missing_ok=True)
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    _check_stop(directory, stop)


def keep_bounds(layout: Path, directory: Path, fit: ImageFit) -> None:
    """Write a recipe's bounds of an image into the processor's files, where they are not those of `layout`.

    So that whoever opens the directory resizes images as training did.
    """
    if fit.grid is None:
        return
    size = {"shortest_edge": fit.min_pixels, "longest_edge": fit.max_pixels}
    known = dict(open_processor(layout).image_processor.size)
    if all(known.get(edge) == pixels for edge, pixels in size.items()):
        return
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (directory / name).is_file():
            continue
        values = read_json(directory, name)
        images = values if "patch_size" in values else values.get("image_processor", {})
        if "patch_size" in images:
            images["size"] = size
            for edge, old in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
                if old in images:
                    images[old] = size[edge]
            write_json(directory / name, values)


def _check_stop(directory: Path, stop: int) -> None:
    """Add the token that ends an answer to generation_config.json, where it is not there already."""
    file = directory / "generation_config.json"
    values = read_json(directory, file.name) if file.is_file() else {}
    known = values.get("eos_token_id")
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if stop not in ends:
        write_json(file, {**values, "eos_token_id": sorted({*ends, stop})})
