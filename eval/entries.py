"""The entries of a benchmark's JSON files: what is wrong with one is said with the file and the entry.

Owns: reading JSON, JSON lines and .gz, and the kinds of values an entry may have. Does not own which keys a benchmark
has (`eval.splits`). Loads without torch.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from models.common.documents import parse as parse_json
from models.common.errors import InputError
from models.common.half_characters import half_character

T = TypeVar("T")
ImageId = int | str


def parse(path: Path, record: Any, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of an entry; what it raises becomes an InputError with the file and the entry."""
    try:
        return parse(record)
    except WrongValueError as error:
        raise InputError(f"{path}: {error}: {_shown(record)}") from None
    except KeyError as error:
        raise InputError(f"{path}: an entry lacks {error.args[0]!r}: {_shown(record)}") from None
    except (TypeError, AttributeError):
        raise InputError(f"{path}: not an entry of this format: {_shown(record)}") from None


class WrongValueError(ValueError):
    """What is wrong with one entry."""


def text_of(record: dict[str, Any], key: str, *, may_be_blank: bool = False) -> str:
    """A text of an entry. A number is one too where a text may be blank: an answer such as 3."""
    value = record[key]
    if may_be_blank and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise WrongValueError(f"{key!r} is {json.dumps(value)[:40]}, and a text is needed")
    if not may_be_blank and not value.strip():
        raise WrongValueError(f"{key!r} is empty")
    return value


def id_of(record: dict[str, Any], key: str) -> ImageId:
    """The id under `key`; raises WrongValueError where it is neither a number nor a text."""
    value = record[key]
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise WrongValueError(f"{key!r} is {json.dumps(value)[:40]}, and a number or a text is needed")
    return value


def file_name_of(record: dict[str, Any]) -> str | None:
    """The image's file as `image` or `file_name` names it; None where neither does."""
    key = next((key for key in ("image", "file_name") if record.get(key) is not None), None)
    return None if key is None else text_of(record, key)


def _shown(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False)[:120]


def read_records(path: Path, key: str) -> tuple[list[dict[str, Any]], str]:
    """The non-empty list under `key`, as VQA v2's files hold it, and the file's digest."""
    value, digest = read_json(path)
    records = value.get(key) if isinstance(value, dict) else None
    if not isinstance(records, list):
        raise InputError(f"{path}: VQA v2's format expected, a mapping with a list {key!r}")
    if not records:
        raise InputError(f"{path} holds no {key}")
    return records, digest


def read_json(path: Path) -> tuple[Any, str]:
    """The value in a file of JSON or JSON lines, .gz too, and the digest of its bytes; raises InputError."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} can't be read: {error}") from None
    if not content.strip():
        raise InputError(f"{path} is empty")
    value = _parsed(path, content)
    if b"\\ud" in content.lower() and (half := half_character(value)):
        raise InputError(f"{path} holds half of a character ({half}), which no tokenizer takes: mend that entry")
    return value, hashlib.sha256(content).hexdigest()


def _parsed(path: Path, content: bytes) -> Any:
    """JSON, or JSON lines as a list: POPE's files are such, whatever their name ends with."""
    try:
        return parse_json(content, path)
    except InputError as error:
        whole = error
    entries: list[Any] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entries.append(parse_json(line, path))
        except InputError as error:
            if not entries:
                raise whole from None
            raise InputError(f"line {number} of {error}: was the file written to its end?") from None
        if not isinstance(entries[-1], dict):
            raise whole
    return entries
