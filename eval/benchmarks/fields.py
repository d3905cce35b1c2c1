"""Fields of an entry by a name such as `a|b.c`, and texts made of fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from eval.entries import WrongValueError

_BRACES = re.compile(r"\{([^{}]+)\}")
EMPTY = ("", "nan")
"""What stands in tables where there is nothing: MMBench's on the hub was written by pandas."""
_PART = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


def find(fields: Mapping[str, Any], name: str) -> Any:
    """The first of the fields in `name` that is there and not null, else None; dots go into objects and lists."""
    for path in _paths(name):
        value: Any = fields
        for part in path:
            if isinstance(value, Mapping):
                value = value.get(part)
            elif isinstance(value, list | tuple) and part.isdigit():
                value = value[int(part)] if int(part) < len(value) else None
            else:
                value = None
        if value is not None:
            return value
    return None


@lru_cache(maxsize=1024)
def _paths(name: str) -> list[list[str]]:
    return [each.split(".") for each in name.split("|")]


def needed(fields: Mapping[str, Any], name: str) -> Any:
    """The same; raises WrongValueError where there is none."""
    value = find(fields, name)
    if value is None:
        raise WrongValueError(f"{' or '.join(name.split('|'))} is missing")
    return value


def filled(template: str, fields: Mapping[str, Any]) -> str:
    """A template with the fields in braces; lists are joined by commas, and missing fields are empty.

    A part in double brackets is left out where one of its fields is empty.
    """

    def part(found: re.Match[str]) -> str:
        inner = found.group(1)
        return inner if all(find(fields, name) not in (None, *EMPTY) for name in _BRACES.findall(inner)) else ""

    def text(found: re.Match[str]) -> str:
        value = find(fields, found.group(1))
        if value is None:
            return ""
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return _BRACES.sub(text, _PART.sub(part, template))
