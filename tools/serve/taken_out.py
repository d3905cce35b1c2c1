"""The long strings of a JSON body, taken out before it is parsed: pictures in base64, of which nobody needs a str.

    {"url": "data:image/png;base64,iVBOR…"}  -->  {"url": "NAME"}  and  NAME -> the string's bytes, in the body's memory

The interpreter is nobody else's while JSON is parsed, 0.1 s for 55 MB, and every other request waits; to find where a
string ends takes 2 ms.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from types import MappingProxyType

MIN_BYTES = 1 << 16
"""Shorter strings stay."""

_MAX_STRINGS = 1000
_VALUE = re.compile(rb'\s*:\s*"')

Taken = Mapping[str, memoryview]
"""What stood in the body, by the names that stand there now."""
NOTHING_TAKEN: Taken = MappingProxyType({})


def take_out(body: bytearray, key: str) -> tuple[bytes | bytearray, Taken]:
    """The body with a name in place of each long string under `key`, and the strings.

    A string with an escape in it stays: most programs write none into base64. What is no JSON stays none.
    """
    parts, taken, end = list[bytes | bytearray | memoryview](), dict[str, memoryview](), 0
    quoted, view, salt = f'"{key}"'.encode(), memoryview(body), secrets.token_hex(16)
    at = body.find(quoted)
    for _ in range(_MAX_STRINGS):
        if at < 0:
            break
        at += len(quoted)
        value = _VALUE.match(body, at)
        if value is not None and (stop := _end_of(body, value.end())) - value.end() >= MIN_BYTES:
            name = f"{salt}-{len(taken)}"
            taken[name] = view[value.end() : stop]
            parts += [view[end : value.end()], name.encode()]
            at = end = stop
        at = body.find(quoted, at)
    return (b"".join([*parts, view[end:]]), taken) if taken else (body, taken)


def _end_of(body: bytearray, start: int) -> int:
    """Where the string that begins at `start` ends; `start` where it has an escape, or no end."""
    stop = body.find(b'"', start)
    return start if stop < 0 or body.find(b"\\", start, stop) >= 0 else stop
