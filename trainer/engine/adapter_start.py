"""A published peft adapter as what a part's new adapters start from: `tune.language.adapter: DIR`.

    DIR/adapter_config.json   --must say what the plan says--> rank, alpha, DoRA; nothing that is not applied here
    DIR/adapter_model.*       --names of every era-----------> our adapters' weights, all of them

peft reads names by the class and the version that wrote them, and leaves what does not match at 0 with a warning. Here
every tensor finds its place, or the stage does not start.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from models.common.documents import read_json
from models.common.errors import InputError
from models.common.pickled import open_file
from models.common.sharded import TensorFiles
from models.published.names import place_of
from trainer.config.tuning import Lora

_BEGINNING = "base_model.model."
_MARK = ".lora_"
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "use_rslora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, True, None),
    "lora_bias": (False, None),
    "layer_replication": ([], None),
    "trainable_token_indices": (None,),
}
"""Values of adapter_config.json with which an adapter is alpha / rank * B A and nothing else."""


def load_adapter(module: nn.Module, part: str, tuning: Lora, prefix: str) -> None:
    """Copy an adapter's weights into the new adapters of a part, in place.

    Args:
        module: the part, with adapters.
        part: vision, projector or language.
        prefix: what names in `module` have before those in the part's class: `model.` of a vision encoder.

    Raises:
        InputError: the adapter is another than the plan's, or a tensor of either has no counterpart.
    """
    assert tuning.adapter is not None
    directory = Path(tuning.adapter).expanduser()
    _check_config(directory, part, tuning)
    files = _open(directory)
    where = {f"{prefix}{name}": raw for raw in files for of, name in [_place(raw)] if of == part}
    others = sorted(raw for raw in files if _place(raw)[0] != part)
    if not where:
        raise InputError(f"{directory}: no adapter of tune.{part} in it ({others[0] if others else 'it is empty'})")
    ours = {name: value for name, value in module.named_parameters() if _MARK in name}
    _check_names(directory, part, set(where), set(ours))
    for name, parameter in ours.items():
        found, expected = list(files.shape(where[name])), list(parameter.shape)
        if found != expected:
            raise InputError(f"{directory}: {where[name]} has shape {found}, the model wants {expected}")
        parameter.data.copy_(files.read(where[name]))


def parts_in(adapter: str) -> frozenset[str]:
    """The parts of a model that an adapter's directory has adapters of."""
    return frozenset(_place(raw)[0] for raw in _open(Path(adapter).expanduser()))


def _open(directory: Path) -> TensorFiles:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (directory / name).is_file():
            return open_file(directory / name)
    raise InputError(f"{directory}: no adapter_model.safetensors in it; give the directory that peft wrote")


def _check_config(directory: Path, part: str, tuning: Lora) -> None:
    config = read_json(directory, "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise InputError(f"{directory}: a {config.get('peft_type')} adapter; only LoRA and DoRA are trained")
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral:
            raise InputError(
                f"{directory}: {key} is {config[key]}, which is not applied here; merge that adapter into its base and"
                " start from the result"
            )
    said = {"rank": config.get("r"), "alpha": config.get("lora_alpha"), "dora": bool(config.get("use_dora"))}
    for name, value in said.items():
        if value != getattr(tuning, name):
            raise InputError(
                f"tune.{part}.{name}: {getattr(tuning, name)}, but the adapter in {directory} has {value}; take that"
            )


def _place(raw: str) -> tuple[str, str]:
    """(part, our name in the part's class) of a tensor in an adapter's file, whatever the era of its names."""
    name = raw.removeprefix(_BEGINNING)
    module, mark, leaf = name.partition(_MARK)
    leaf = leaf.removesuffix(".weight")
    is_embedding = leaf.startswith("embedding_")
    ours = f"{mark}{leaf}.default" if is_embedding else f"{mark}{leaf}.default.weight"
    place = place_of(f"{module}.weight")
    if place is None:  # over a language model alone
        return "language", f"{module}{ours}"
    return place.part, f"{place.name.removesuffix('.weight')}{ours}"


def _check_names(directory: Path, part: str, found: set[str], expected: set[str]) -> None:
    if found == expected:
        return
    lacking, spare = sorted(expected - found), sorted(found - expected)
    example = f"it has none for {lacking[0]}" if lacking else f"the plan has none for {spare[0]}"
    raise InputError(
        f"{directory}: adapts other layers than tune.{part}.targets: {example}"
        f" ({len(lacking)} lacking, {len(spare)} spare); name the adapter's own targets"
    )
