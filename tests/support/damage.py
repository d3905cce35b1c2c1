"""What a hostile or a broken copy does to safetensors files and JSON documents."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Give a safetensors file another header over the same bytes."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def _set(key: str, value: Any) -> Callable[[Path], None]:
    return lambda file: rewrite_header(file, lambda header: _first(header).update({key: value}))


def _without_queries(header: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in header.items() if not name.endswith("q_proj.weight")}


def _transpose(header: dict[str, Any]) -> None:
    for name, entry in header.items():
        if name != "__metadata__" and len(entry["shape"]) == 2:
            entry["shape"].reverse()


TENSORS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "header cut": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "values cut": lambda file: file.write_bytes(file.read_bytes()[:-4]),
    "header of 2^60 bytes": lambda file: file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:]),
    "no JSON": lambda file: file.write_bytes(struct.pack("<Q", 5) + b"abcde"),
    "deep": lambda file: file.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
    "a list": lambda file: rewrite_header(file, lambda header: [1]),
    "offsets outside": _set("data_offsets", [1 << 50, (1 << 50) + 4]),
    "offsets backwards": _set("data_offsets", [8, 0]),
    "negative offsets": _set("data_offsets", [-4, 0]),
    "one offset": _set("data_offsets", [0]),
    "unknown dtype": _set("dtype", "F12"),
    "dtype of another size": _set("dtype", "F64"),
    "wrong shape": _set("shape", [3, 1000]),
    "huge shape": _set("shape", [1 << 62, 1 << 62]),
    "shape of texts": _set("shape", ["3"]),
    "no shape": lambda file: rewrite_header(file, lambda header: _first(header).pop("shape") and None),
}
"""Each is found in the file's header."""

MISSING: dict[str, Callable[[Path], Any]] = {
    "tensors are missing": lambda file: rewrite_header(file, _without_queries),
    "transposed tensors": lambda file: rewrite_header(file, _transpose),
}
"""The file is whole, and is not the model's."""

DEEP = "[" * 100_000 + "]" * 100_000
DOCUMENTS: dict[str, str] = {
    "empty": "",
    "cut": '{"a": [1, ',
    "a list": "[1, 2]",
    "null": "null",
    "deep": DEEP,
    "deep within": f'{{"model_type": {"[" * 200}{"]" * 200}}}',
    "empty object": "{}",
    "endless number": '{"version": ' + "9" * 5000 + "}",
}
