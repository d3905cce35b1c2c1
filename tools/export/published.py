"""A bundle as a directory for the hub: `sightline export RUN-or-BUNDLE OUT --to stock`.

    the bundle's files, a projector of one layer in the form that every program knows
    sightline.json without this machine's paths, README.md as a model card  --> huggingface_hub.upload_folder(OUT)

config.json keeps what it said, but of the machine that made it. Transformers 5 and 4.57 and vLLM open OUT;
`sightline.load` does too. It is compared with the bundle.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.errors import InputError
from models.common.files import new_directory

if TYPE_CHECKING:
    from torch import Tensor

    from models.common.sharded import TensorFiles
    from tools.export.formats import ExportOptions

PROJECTOR = "multi_modal_projector"


def export(bundle: Path, out: Path, options: ExportOptions) -> str:
    """Write the directory and compare it with the bundle.

    Raises:
        InputError: the bundle is damaged, it has a class that only this project has, or parity fails.
    """
    from models.bundle import verify
    from models.common.source import sha256_of
    from models.opening import open_config
    from tools.export.answering import Limits, finish
    from tools.export.card import write_card
    from tools.export.parity import compare, read_bundle
    from tools.export.public import check_stock, without_paths

    manifest, probes = verify(bundle), list(options.probes)
    config = open_config(bundle)
    check_stock(config, bundle, "stock")
    if getattr(config.vision_config, "use_swiglu_ffn", False):
        raise InputError(
            f"{bundle}: a {config.vision_config.model_type} with gated layers cannot be exported to stock: transformers"
            " 4.57 has gate and up as one weight; transformers 5 opens the bundle as it is"
        )
    with new_directory(out) as directory:
        note = write_stock(bundle, directory, config)
        reference = read_bundle(bundle, probes)
        parity = compare(reference, read_bundle(directory, probes), manifest.precision, "the bundle")
        facts: dict[str, Any] = {"recipe": without_paths(manifest.recipe), "precision": manifest.precision}
        facts["parents"] = {**without_paths(manifest.parents), "bundle_manifest": sha256_of(bundle / "sightline.json")}
        limits = Limits(options.force, options.memory_gb)
        refusal = f"{out}: it differs from {bundle}"
        made = finish(directory, probes, parity, refusal, limits, layers=manifest.layers, **facts)
        write_card(directory, "stock", manifest.recipe, made.parity, options, family=config.model_type)
    return f"{config.architectures[0]} for the hub{note}"


def write_stock(bundle: Path, directory: Path, config: Any) -> str:
    """Write weights and documents; returns what a user should know about them, or ""."""
    from models.bundle_files import copy_config
    from models.common.sharded import ShardedWriter, TensorFiles
    from models.export import hub_name

    files = TensorFiles.open(bundle)
    copy_documents(bundle, directory)
    pair = projector_pair(files, config)
    writer = ShardedWriter(directory)
    for name, value in stock_tensors(files, pair):
        writer.add(hub_name(name, config.vision_config.model_type), value)
    writer.close()
    copy_config(bundle, directory, as_pair(pair))
    if pair is None and is_linear(config):
        widths = f"{config.vision_config.hidden_size} and {config.text_config.hidden_size}"
        return f"; vLLM refuses its projector of one layer (widths {widths}: a pair needs twice the first)"
    return ""


def copy_documents(bundle: Path, directory: Path) -> None:
    """Copy the tokenizer's, the processor's and the template's files: all but weights, config.json and manifest."""
    for file in sorted(bundle.iterdir()):
        is_weights = file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")
        if not is_weights and file.name not in ("config.json", "sightline.json", "README.md"):
            shutil.copy2(file, directory / file.name)


def projector_pair(files: TensorFiles, config: Any) -> dict[str, Tensor] | None:
    """A linear projector's weights as two layers with GELU between; None for others, or where it is too wide."""
    from models.projectors.linear import gelu_pair

    if not is_linear(config):
        return None
    weight, bias = (files.read(f"{PROJECTOR}.linear_1.{leaf}") for leaf in ("weight", "bias"))
    return gelu_pair(weight, bias)


def is_linear(config: Any) -> bool:
    """Whether a model has a projector, and that of one layer."""
    return getattr(config, "projector_hidden_act", None) == "linear"


def as_pair(pair: dict[str, Tensor] | None) -> dict[str, Any]:
    """What config.json says of a `projector_pair`."""
    return {} if pair is None else {"projector_hidden_act": "gelu"}


def stock_tensors(files: TensorFiles, pair: dict[str, Tensor] | None) -> Iterator[tuple[str, Tensor]]:
    """The bundle's tensors, those of the projector replaced where there is a pair."""
    for name in files:
        part, _, rest = name.partition(".")
        yield name, pair[rest] if pair is not None and part == PROJECTOR else files.read(name)
