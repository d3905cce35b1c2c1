"""A bundle on disk: a model directory in Hugging Face format, and sightline.json, which says what it is.

    config.json, *.safetensors, tokenizer and processor files, chat_template.jinja, generation_config.json
    sightline.json = {format, version, recipe, precision, parents, files: {name: sha256}, parity, forced, layers}

Owns that manifest. Loads without torch; the weights are transformers' business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from models.errors import InputError
from models.files import write_json
from models.source import sha256_of
from models.spec import Config

FORMAT = "sightline-bundle"
VERSION = 1
NAME = "sightline.json"

Precision = Literal["fp32", "fp16", "bf16", "nf4", "int8"]


class Check(Config):
    """One measurement of the parity report against its bound; `bound` None: reported only."""

    name: str
    value: float
    bound: float | None
    passed: bool


class Parity(Config):
    """How a bundle compares with what it was made from, on a few prompts with pictures."""

    reference: str
    num_prompts: int
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every bound holds."""
        return all(check.passed for check in self.checks)


class LayerReport(Config):
    """A linear layer of a quantized bundle: what it is held in, and what quantizing it does to its output.

    `error` is |(W - Q(W)) x| / |W x| over the golden set's inputs x, also for a layer that stayed whole.
    """

    name: str
    precision: Precision
    error: float


class Manifest(Config):
    """sightline.json. `files` has the sha256 of every other file in the directory.

    `forced`: the parity report failed and the bundle was written all the same. `layers` is there where it is quantized.
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
    """Take the digest of every file in the directory and write sightline.json beside them."""
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


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a bundle; raises InputError where there is none or where it is not one."""
    file = directory / NAME
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; give a bundle that tools.merge or tools.quantize made")
    if not file.is_file():
        raise InputError(f"{directory}: no {NAME} in it, so it is no bundle; make one with tools.merge")
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(key) for key in fault["loc"]) or "the whole file"
        raise InputError(f"{file}: {where}: {fault['msg']}; make the bundle again") from error


def verify(directory: Path) -> Manifest:
    """The manifest, after every file it lists was found to be there and unchanged, and no other was found.

    Raises InputError, naming the file, where that is not so.
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


def _names(directory: Path) -> set[str]:
    """Paths of all files in the directory, hidden ones left out."""
    paths = [file.relative_to(directory) for file in directory.rglob("*") if file.is_file()]
    return {str(path) for path in paths if not any(part.startswith(".") for part in path.parts)}
