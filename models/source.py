"""Where weights come from: a local directory in Hugging Face format, or a hub name that is fetched once.

Owns finding the directory, reading its JSON and hashing its weights. Does not build any model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from models.errors import InputError
from models.spec import Config

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json")


def directory_of(path: str) -> Path:
    """The local directory of `path`; a hub name is downloaded (or found in the hub's cache).

    Raises InputError where neither a directory nor a reachable hub repository of that name exists.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise InputError(f"{local}: no config.json in it; a model directory in Hugging Face format is expected")
        return local
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise InputError(f"{path}: no such directory, and not a hub name (owner/name) either")
    return _from_hub(path)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen kinds; to the user they all mean the same
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name}: no such directory, and the hub did not give it ({reason})") from error


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in `directory/name`; raises InputError naming the file where it is missing or broken."""
    file = directory / name
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; is {directory} a complete model directory?") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not valid JSON ({error}); fetch the model again") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: an object was expected, found {type(value).__name__}")
    return value


def sha256_of(file: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest_of(directory: Path) -> str:
    """One sha256 over the weights and config.json of a model directory: the identity of a frozen base."""
    files = sorted({file for pattern in WEIGHT_PATTERNS for file in directory.glob(pattern)})
    lines = [f"{file.name} {sha256_of(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def part_digest(part: Config) -> str | None:
    """The identity of a part's pretrained weights by its values in a recipe; None where no file says it."""
    if path := getattr(part, "path", ""):
        return digest_of(directory_of(path))
    weights = Path(getattr(part, "weights", ""))
    return sha256_of(weights) if weights.is_file() else None
