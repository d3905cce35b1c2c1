"""A bundle on disk: a model directory in Hugging Face format, and sightline.json, its manifest.

    config.json, *.safetensors, tokenizer and processor files, chat_template.jinja, generation_config.json
    sightline.json = {format, version, recipe, precision, parents, files: {name: sha256}, parity, forced, layers}

Owns that manifest. Loads without torch; transformers loads the weights.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError

from models.common.documents import bare_name, read_value
from models.common.errors import InputError
from models.common.files import write_json
from models.common.source import sha256_of
from models.spec import Config

log = logging.getLogger(__name__)

FORMAT = "sightline-bundle"
VERSION = 1
NAME = "sightline.json"

Precision = Literal["fp32", "fp16", "bf16", "nf4", "int8", "w4a16", "w8a16"]


class Check(Config):
    """One measurement of the parity report against its bound; `bound` None: reported only. `note`: the reason."""

    model_config = ConfigDict(allow_inf_nan=True)  # a measurement may be; the check then fails

    name: str
    value: float
    bound: float | None
    passed: bool
    note: str = ""


class Parity(Config):
    """How a bundle compares with the model it was made from, on a few prompts with images."""

    reference: str
    num_prompts: int
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every bound holds."""
        return all(check.passed for check in self.checks)


class LayerReport(Config):
    """A linear layer of a quantized bundle: its precision, and how much quantizing changes its output.

    `error` is |(W - Q(W)) x| / |W x| over the golden set's inputs x, also for a layer that was not quantized.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    name: str
    precision: Precision
    error: float


class Manifest(Config):
    """sightline.json. `files` has the sha256 of every other file in the directory.

    `forced`: the parity report failed and the bundle was written anyway. `layers` is set for a quantized bundle.
    """

    format: Literal["sightline-bundle"]
    version: Literal[1]
    recipe: dict[str, Any]
    precision: Precision
    parents: dict[str, str]
    files: dict[str, str]
    parity: Parity
    forced: bool = False
    layers: tuple[LayerReport, ...] = ()


def write_manifest(
    directory: Path,
    *,
    recipe: dict[str, Any],
    precision: Precision,
    parents: dict[str, str],
    parity: Parity,
    layers: tuple[LayerReport, ...] = (),
) -> Manifest:
    """Hash every file in the directory and write sightline.json next to them."""
    files = {file.name: sha256_of(file) for file in sorted(directory.iterdir()) if file.name != NAME}
    manifest = Manifest(
        format="sightline-bundle",
        version=1,
        recipe=recipe,
        precision=precision,
        parents=parents,
        files=files,
        parity=parity,
        forced=not parity.passed,
        layers=layers,
    )
    write_json(directory / NAME, manifest.model_dump(mode="json"))
    return manifest


def add_checks(directory: Path, manifest: Manifest, checks: tuple[Check, ...]) -> Manifest:
    """Append checks to the manifest's parity report, replace the manifest in the directory, and return it."""
    parity = Parity(
        reference=manifest.parity.reference,
        num_prompts=manifest.parity.num_prompts,
        checks=(*manifest.parity.checks, *checks),
    )
    longer = manifest.model_copy(update={"parity": parity, "forced": not parity.passed})
    write_json(directory / NAME, longer.model_dump(mode="json"))
    return longer


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a bundle; raises InputError where it is missing or invalid."""
    file = directory / NAME
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; give a bundle that tools.merge or tools.quantize made")
    if not file.is_file():
        raise InputError(f"{directory}: no {NAME} in it, so it is no bundle; make one with tools.merge")
    try:
        manifest = Manifest.model_validate_json(json.dumps(read_value(file, "make the bundle again")))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(key) for key in fault["loc"]) or "the whole file"
        raise InputError(f"{file}: {where}: {fault['msg']}; make the bundle again") from error
    for name in manifest.files:
        bare_name(name, file, "files")
    return manifest


def verify(directory: Path) -> Manifest:
    """Check that the bundle has exactly the files that its manifest lists, unchanged, and return the manifest.

    Raises InputError, naming the file, where it does not.
    """
    manifest = read_manifest(directory)
    for name, digest in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise InputError(f"{file}: missing from the bundle; make it again or copy it again")
        if sha256_of(file) != digest:
            raise InputError(f"{file}: changed since the bundle was made; make it again or copy it again")
    unlisted = sorted(_names(directory) - {*manifest.files, NAME, "README.md"})
    if unlisted:  # a loader reads files by their names: an adapter, other weights, another template
        raise InputError(f"{directory / unlisted[0]}: not one of the bundle's files; take it away")
    return manifest


def find_manifest(directory: Path, *, compare_files: bool = True) -> Manifest | None:
    """The manifest of a directory; None, and a line that says so, where another maker's model has none.

    Args:
        compare_files: each file with its digest in the manifest, as `verify` does.

    Raises:
        InputError: as `verify` and `read_manifest` do; there is neither a manifest nor a config.json.
    """
    if not (directory / NAME).is_file() and (directory / "config.json").is_file():
        log.warning("%s: no %s in it, so its files and its parity are not checked", directory, NAME)
        return None
    return verify(directory) if compare_files else read_manifest(directory)


def _names(directory: Path) -> set[str]:
    """Paths of all files in the directory, hidden ones left out."""
    paths = [file.relative_to(directory) for file in directory.rglob("*") if file.is_file()]
    return {str(path) for path in paths if not any(part.startswith(".") for part in path.parts)}
