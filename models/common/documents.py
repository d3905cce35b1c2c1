"""JSON that somebody else may have written or damaged: the one place where it is parsed and its values get their types.

    bytes --parse--> a value --check--> the value, of the shape that a schema says --> whoever reads it

Every fault (no UTF-8, no JSON, nested too deeply, too long a number, a key that is missing or of another type) is an
`InputError` of one line with the file and the key. No other module calls `json.loads` (a test looks). Does not own what
values mean. Loads without torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, TypeAdapter, ValidationError

from models.common.errors import InputError, single_line

T = TypeVar("T")

MAX_DEPTH = 64
"""Deepest nesting of objects and lists in a document. Real ones have less than 20; Python's own limit, which is met
somewhere later, is about 1,000 function calls."""

MAX_BYTES = 1 << 28
"""Largest document: the meta.json of a set of two million tars has less. Data (captions, questions) may be larger."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text is expected")
    return value


if TYPE_CHECKING:
    Text = str
else:
    Text = Annotated[Any, AfterValidator(_text)]
    """A text of a schema that may come from file names, which need not be Unicode; pydantic's own refuses those."""

_OBJECT: Any = dict[Any, Any]
_BARE = re.compile(r"[^/\\\0]+")


def parse(content: bytes | str, where: object, advice: str = "") -> Any:
    """The value of a JSON text.

    Args:
        where: names it in errors, the file for example.
        advice: what to do, the end of errors.

    Raises:
        InputError: it is no JSON.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise _fault(where, "not valid JSON: nested too deeply", advice) from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, and a number of more digits than Python reads
        raise _fault(where, f"not valid JSON ({single_line(error)})", advice) from error


def check(value: Any, schema: type[T], where: object, advice: str = "") -> T:
    """`value`, once it is known to be as `schema` (a TypedDict, a list of them) says; a text is no number there.

    Keys that the schema does not name are left as they are.

    Raises:
        InputError: it is not; the first key that is missing or of another type is named.
    """
    try:
        hashable: Any = schema
        _adapter(hashable).validate_python(value, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(key) for key in fault["loc"])
        raise _fault(where, f"{place}: {_described(fault)}" if place else _described(fault), advice) from error
    return value


def read_value(file: Path, advice: str = "") -> Any:
    """The value in a file.

    Raises:
        InputError: there is no such file, it is larger than `MAX_BYTES`, no JSON, or nested deeper than `MAX_DEPTH`.
        OSError: it cannot be read.
    """
    try:
        num_bytes = file.stat().st_size
        if num_bytes > MAX_BYTES:
            raise _fault(file, f"{num_bytes} bytes, where at most {MAX_BYTES} are read", advice)
        content = file.read_bytes()
    except FileNotFoundError:
        raise _fault(file, "no such file", advice) from None
    except (IsADirectoryError, NotADirectoryError) as error:
        raise _fault(file, error.strerror or "no file", advice) from None
    value = parse(content, file, advice)
    if _is_deeper(value, MAX_DEPTH):
        raise _fault(file, f"nested deeper than {MAX_DEPTH} levels", advice)
    return value


def read_as(file: Path, schema: type[T], advice: str = "") -> T:
    """The value in a file, which is as `schema` says. Raises as `read_value` and `check` do."""
    return check(read_value(file, advice), schema, file, advice)


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in `directory/name` of a model, a run or a bundle. Raises as `read_as` does."""
    found: dict[str, Any] = read_as(directory / name, _OBJECT, f"is {directory} complete? fetch or copy it again")
    return found


def bare_name(name: str, where: object, key: str) -> str:
    """`name`, once it is known to be the name of a file or directory right there.

    Raises:
        InputError: it is a path, or one of the names that lead to another directory.
    """
    if name in (".", "..") or not _BARE.fullmatch(name) or not _can_be_written(name):
        raise InputError(f"{where}: {key}: {name[:80]!r} is no name of a file right there, and nothing else is taken")
    return name


def _can_be_written(name: str) -> bool:
    """Whether a file system takes the characters; half of a pair is one that it does not."""
    try:
        return bool(os.fsencode(name))
    except UnicodeEncodeError:
        return False


@contextmanager
def understanding(where: object, advice: str = "") -> Iterator[None]:
    """For a block that takes values out of a document of many shapes (a model's config.json): what is missing there, or
    of another kind, is an InputError that names the document.
    """
    try:
        yield
    except KeyError as error:
        raise _fault(where, f"{error.args[0] if error.args else 'a key'}: missing", advice) from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise _fault(where, f"a value is not of its kind ({single_line(error)})", advice) from error


@lru_cache(maxsize=256)
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _described(fault: Any) -> str:
    if fault["type"] == "missing":
        return "missing"
    text = str(fault["msg"])
    return f"found {_shown(fault['input'])}; {text[0].lower()}{text[1:]}"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fault(where: object, what: str, advice: str) -> InputError:
    return InputError(f"{where}: {what}; {advice}" if advice else f"{where}: {what}")


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested deeper; level by level, since the question is whether a recursion ends."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        inner = (each for outer in level for each in (outer.values() if isinstance(outer, dict) else outer))
        level = [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return False
    return True
