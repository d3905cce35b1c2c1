"""A set's meta.json: what it may say, whoever wrote it.

Owns its schema and the bounds on what it names. A set's names become paths, and those of a set at an address become
files on this machine, so only names of tars right there and of our own arrays are taken, with sizes that are bounded.
Does not own the arrays (`data_pipeline.index`).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from models.common.documents import Text, bare_name, check, read_value
from models.common.errors import InputError

INDEX_VERSION = 1
INDEX_FOLDER = "index"
META_FILE = f"{INDEX_FOLDER}/meta.json"

_Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class Shard(TypedDict):
    """A tar of the set."""

    name: Text
    num_bytes: _Count
    num_samples: _Count


class IndexMeta(TypedDict):
    """The content of meta.json."""

    version: int
    fingerprint: str
    extensions: list[Text]
    array_bytes: NotRequired[dict[Text, _Count]]
    """Sizes of the arrays' files; older versions did not write them, since they are needed at an address alone."""
    shards: list[Shard]


class _Version(TypedDict):
    version: int


def read_meta(folder: Path, arrays: Collection[str]) -> IndexMeta:
    """The meta.json of a set.

    Args:
        arrays: the names of its arrays; it has each once, and no other.

    Raises:
        InputError: no set there, no index, another version, damaged, or a name or a size that is not taken.
    """
    path = folder / META_FILE
    if not folder.is_dir():
        raise InputError(f"no shard set at {folder}: make one with `python -m tools.shards make {folder} …`")
    if not path.is_file():
        raise InputError(f"{folder} has no index: run `python -m tools.shards index {folder}`")
    advice = f"is damaged: run `python -m tools.shards index {folder}` again"
    value: Any = read_value(path, advice)
    version = check(value, _Version, path, advice)["version"]
    if version != INDEX_VERSION:
        raise InputError(f"{path} has version {version}, this program reads {INDEX_VERSION}: index the set again")
    meta = check(value, IndexMeta, path, advice)
    _check_names(meta, arrays, path)
    return meta


def check_room(meta: IndexMeta, num_bytes: int, where: str) -> None:
    """Raise InputError where copies of a set at an address would not fit: its arrays together, or one of its tars."""
    if "array_bytes" not in meta:
        raise InputError(f"{where}: its index does not say how large it is: index the set again")
    largest = max(meta["shards"], key=lambda shard: shard["num_bytes"], default=None)
    for name, size in (
        ("the index", sum(meta["array_bytes"].values())),
        *(((largest["name"], largest["num_bytes"]),) if largest is not None else ()),
    ):
        if size > num_bytes:
            raise InputError(
                f"{where}: {name} has {size / 1e9:.3g} GB, and the cache {num_bytes / 1e9:.3g} GB: raise cache_gb"
            )


def _check_names(meta: IndexMeta, arrays: Collection[str], path: Path) -> None:
    found = meta.get("array_bytes", arrays)
    if set(found) != set(arrays):
        listed = ", ".join(map(repr, sorted(found)))[:200] or "nothing"
        raise InputError(f"{path}: array_bytes: found {listed}; an index has {', '.join(sorted(arrays))}")
    seen: set[str] = set()
    for number, shard in enumerate(meta["shards"]):
        name = bare_name(shard["name"], path, f"shards.{number}.name")
        if not name.endswith(".tar"):
            raise InputError(f"{path}: shards.{number}.name: {name[:80]!r} is no tar")
        if name in seen:
            raise InputError(f"{path}: shards.{number}.name: {name[:80]!r} is listed twice; index the set again")
        seen.add(name)
