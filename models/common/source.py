"""Where weights come from: a local directory in Hugging Face format, or a hub name that is fetched once.

Owns finding the directory, reading its JSON and hashing its weights. Does not build any model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from models.common.documents import read_json
from models.common.errors import InputError, single_line
from models.common.node import first_on_node


@dataclass(frozen=True)
class PartFacts:
    """A pretrained part's config.json, and where it was found."""

    config: Mapping[str, Any]
    source: str
    """Shown in messages: a file, or why there is none."""
    directory: Path | None
    """The directory of its weights and files; None: not on this machine."""


FindPart = Callable[[str], PartFacts]
"""The facts of the pretrained model at a path (a local directory or a hub name)."""

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json")

_OLD_WEIGHT_PATTERNS = ("*.bin", "*.bin.index.json")
"""Read, and so hashed, only where there are no safetensors."""

FOREIGN_FORMATS = {".gguf": "GGUF", ".onnx": "ONNX"}
"""Formats of weights that a recipe cannot name, and that `sightline convert` reads, by their files' endings."""


def directory_of(path: str) -> Path:
    """The local directory of `path`; a hub name is downloaded (or found in the hub's cache).

    Raises InputError where neither a directory nor a reachable hub repository of that name exists.
    """
    local = local_directory(path)
    if local is not None:
        return local
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise InputError(f"{path}: no such directory, and not a hub name (owner/name) either")
    return _from_hub(path)


def local_directory(path: str) -> Path | None:
    """The directory at `path` if it is on this machine; None where nothing is.

    Raises InputError where it is no model directory in Hugging Face format: it says what else it is, and what to do.
    """
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix in FOREIGN_FORMATS:
            raise InputError(_advice(local, local))
        raise InputError(f"{local}: a file; a model directory in Hugging Face format is expected")
    if not local.is_dir():
        return None
    if foreign := foreign_weights(local):
        raise InputError(_advice(local, foreign[0]))
    if not (local / "config.json").is_file():
        raise InputError(f"{local}: no config.json in it; a model directory in Hugging Face format is expected")
    return local


def has_weights(directory: Path) -> bool:
    """Whether a directory has weights that transformers loads."""
    return any(any(directory.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))


def check_weights(facts: PartFacts) -> None:
    """Raise InputError where a part is on this machine and its directory has no weights that transformers loads."""
    if facts.directory is not None and not has_weights(facts.directory):
        raise InputError(f"{facts.directory}: no weights in it (*.safetensors or *.bin); fetch the model again")


def check_loaded(path: str, report: Mapping[str, Any], unused: tuple[str, ...] = ()) -> None:
    """Check transformers' own account of what it loaded: a weight that it did not find it draws at random, in silence.

    `unused` are parts of the names of weights that may be missing. Raises InputError naming the others.
    """
    missing = sorted(name for name in report["missing_keys"] if not any(part in name for part in unused))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"{path}: its weights lack {', '.join(missing[:3])}{more}: not a model of this kind, or not all of it;"
            " check model.*.kind, or fetch it again"
        )


def foreign_weights(directory: Path) -> list[Path]:
    """Files of a format that only `sightline convert` reads, where a directory has no weights beside them."""
    if has_weights(directory):
        return []
    found = (
        file for suffix in FOREIGN_FORMATS for folder in (".", "onnx") for file in directory.glob(f"{folder}/*{suffix}")
    )
    return sorted(found)


def _advice(path: Path, file: Path) -> str:
    """What weights of a foreign format are, and the command that makes a model directory of them."""
    form = FOREIGN_FORMATS[file.suffix]
    return f"{path}: weights as {form}; make a directory of them that can be trained: sightline convert {file} OUT"


def read_part(path: str) -> PartFacts:
    """The facts of the model at `path`, which is downloaded if necessary; raises InputError as `directory_of` does."""
    directory = directory_of(path)
    return PartFacts(read_json(directory, "config.json"), str(directory / "config.json"), directory)


def _from_hub(name: str) -> Path:
    """The hub's copy on this machine; of the ranks of a start one asks the hub, and the others take what it fetched."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with first_on_node(f"the hub's {name}") as is_first:
            if not is_first:
                with suppress(LocalEntryNotFoundError):
                    return _snapshot(name, is_local=True)
            return _snapshot(name, is_local=False)
    except Exception as error:  # the hub's client raises a dozen kinds; to the user they all mean the same
        reason = single_line(error)
        raise InputError(f"{name}: no such directory, and the hub did not give it ({reason})") from error


def _snapshot(name: str, *, is_local: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    directory = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=is_local))
    if not any(directory.glob("*.safetensors")):  # an old repository: torch reads these as weights only
        directory = Path(snapshot_download(name, allow_patterns=[*patterns, "*.bin"], local_files_only=is_local))
    return directory


def sha256_of(file: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest_of(directory: Path) -> str:
    """One sha256 over the weights and config.json of a model directory: the identity of a frozen base."""
    patterns = WEIGHT_PATTERNS if any(directory.glob("*.safetensors")) else (*WEIGHT_PATTERNS, *_OLD_WEIGHT_PATTERNS)
    return _digest(sorted({file for pattern in patterns for file in directory.glob(pattern)}))


def digest_of_files(directory: Path, names: Sequence[str]) -> str:
    """One sha256 over those files of a directory that are there."""
    return _digest(sorted(file for name in names if (file := directory / name).is_file()))


def sha256_once(file: Path) -> str:
    """The sha256 of a file, computed once a process: a chain of stages asks for the same weights at every stage.

    A file that was written since, by its size and time, is read again.
    """
    stat = file.stat()
    return _sha256_once(file, stat.st_size, stat.st_mtime_ns)


def _digest(files: Sequence[Path]) -> str:
    lines = [f"{file.name} {sha256_once(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@lru_cache(maxsize=4096)
def _sha256_once(file: Path, num_bytes: int, modified_ns: int) -> str:
    del num_bytes, modified_ns
    return sha256_of(file)
