"""The table of what `sightline export` writes: each format's module, what it is made from, and who opens it.

A run is a checkpoint over its pretrained parts, a bundle is a merged model. Where a format is made from a bundle and a
run is given, the run is merged first. Loads without torch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from models.common.documents import read_json
from models.common.errors import InputError
from models.published.family import NATIVE_FAMILIES

if TYPE_CHECKING:
    from tools.export.golden import Probe


class Format(NamedTuple):
    """One format: the "module:function" that writes it, what that takes, and a line about it."""

    target: str
    takes: Literal["run", "bundle"]
    purpose: str
    has_native: bool = True
    """Whether it holds a model of native resolution."""


FORMATS = {
    "adapter": Format("tools.export.adapter:export", "run", "what LoRA learnt, for peft and vLLM, over its base"),
    "stock": Format(
        "tools.export.published:export", "bundle", "a directory for the hub: the whole model and a model card"
    ),
    "w4a16": Format(
        "tools.export.compressed:export_w4a16", "bundle", "4-bit weights by GPTQ, for vLLM and transformers"
    ),
    "w8a16": Format("tools.export.compressed:export_w8a16", "bundle", "the same in 8 bits"),
    "gguf": Format("tools.export.gguf_files:export", "bundle", "language model and image part for llama.cpp", False),
}


@dataclass(frozen=True)
class ExportOptions:
    """What a command line says besides source and format.

    `base` is where an adapter's base is written; `licence` and `figures` (a file of `eval.run`) go into the model card;
    `budget` is the largest relative logit difference; `memory_gb` is for opening a result whole (None: what is free).
    """

    probes: tuple[Probe, ...]
    force: bool = False
    memory_gb: float | None = None
    budget: float | None = None
    base: Path | None = None
    licence: str = "other"
    figures: Path | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace, probes: list[Probe]) -> ExportOptions:
        """The options of a command line, with its golden set read."""
        names = ("force", "memory_gb", "budget", "base", "licence", "figures")
        return cls(tuple(probes), **{name: getattr(arguments, name) for name in names})


def export_to(name: str, source: Any, out: Path, options: ExportOptions) -> str:
    """Write a source (a run's `Source`, or the path of a bundle) in a format, atomically; returns a line about it.

    Raises:
        InputError: the format cannot hold this model, or its parity fails.
    """
    if isinstance(source, Path) and not FORMATS[name].has_native:
        _check_family(source, name)
    module, _, function = FORMATS[name].target.partition(":")
    return str(getattr(import_module(module), function)(source, out, options))


def _check_family(bundle: Path, name: str) -> None:
    kind = str(read_json(bundle, "config.json").get("model_type"))
    if kind in NATIVE_FAMILIES:
        raise InputError(
            f"{bundle}: {kind} is not written as {name}: its tower is not known there; --to stock writes it for the"
            " hub, and --to w4a16 or `sightline quantize --to nf4` makes it smaller"
        )
