"""Builds the index of a shard set in one pass over its tars, several tars at a time.

Owns the grouping of members into samples and the set's fingerprint. `data_pipeline.index` owns the layout.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.images import PICTURE_EXTENSIONS, header_size
from data_pipeline.index import ARRAYS, INDEX_FOLDER, INDEX_VERSION
from data_pipeline.tar import TarError, TarMember, read_members
from models.errors import InputError

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
"""WebDataset's own split: the key ends at the first dot of the file name."""

_MAX_MEMBER_BYTES = 2**30
"""One `pread` takes at most 2 GiB."""

_MAX_EXTENSIONS = 2**16


@dataclass(slots=True)
class ShardTable:
    """The samples of one tar, in columns."""

    name: str
    num_bytes: int
    keys: list[str] = field(default_factory=list)
    num_members: list[int] = field(default_factory=list)
    members: list[tuple[int, int, int, str, int, int]] = field(default_factory=list)
    """(offset, size, crc32, extension, width, height)."""


def scan_shard(path: Path) -> ShardTable:
    """Read one tar once: where its samples lie, their checksums, and the size of their pictures.

    Raises:
        TarError: damaged, compressed, or holding names or duplicates that no sample can have.
    """
    table = ShardTable(path.name, path.stat().st_size)
    seen: set[str] = set()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for member in read_members(path):
            _add_member(table, seen, path, member, descriptor)
    finally:
        os.close(descriptor)
    return table


def _add_member(table: ShardTable, seen: set[str], path: Path, member: TarMember, descriptor: int) -> None:
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts:
        raise TarError(f"{path}: a member named {member.name!r}; names must stay inside the archive")
    match = _NAME.match(member.name)
    if match is None or parts[0] == "__MACOSX":
        return
    key, extension = match[1], match[2].lower()
    if not table.keys or table.keys[-1] != key:
        if key in seen:
            raise TarError(f"{path}: the key {key!r} comes twice; keys must be unique and their members together")
        seen.add(key)
        table.keys.append(key)
        table.num_members.append(0)
    elif extension in (row[3] for row in table.members[len(table.members) - table.num_members[-1] :]):
        raise TarError(f"{path}: {member.name!r} comes twice")
    if member.size > _MAX_MEMBER_BYTES:
        raise TarError(f"{path}: {member.name!r} has {member.size} bytes; at most {_MAX_MEMBER_BYTES} fit a sample")
    payload = os.pread(descriptor, member.size, member.offset)
    is_picture = extension.rsplit(".", 1)[-1] in PICTURE_EXTENSIONS
    width, height = header_size(io.BytesIO(payload)) if is_picture else (0, 0)
    table.members.append((member.offset, member.size, zlib.crc32(payload), extension, width, height))
    table.num_members[-1] += 1


def build_index(folder: Path, *, jobs: int = 1, progress: bool = False) -> str:
    """Index every `*.tar` of a directory and return the set's fingerprint. Replaces an older index at the end.

    Raises:
        InputError: no tars, no samples, or a tar that cannot be read to its end (named).
    """
    if not folder.is_dir():
        raise InputError(f"no directory {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".tar" and path.is_file())
    if not paths:
        raise InputError(f"{folder} holds no *.tar; nothing to index")
    tables = list(_scan_all(paths, jobs, progress))
    if not any(table.keys for table in tables):
        raise InputError(f"{folder}: the tars hold no samples (files named KEY.EXTENSION)")
    return write_index(folder, tables)


def _scan_all(paths: list[Path], jobs: int, progress: bool) -> Iterable[ShardTable]:
    from tqdm import tqdm

    bar = tqdm(total=len(paths), desc="index", unit="shard", disable=not progress)
    with bar:
        if jobs <= 1 or len(paths) == 1:
            for path in paths:
                yield scan_shard(path)
                bar.update()
            return
        with ProcessPoolExecutor(min(jobs, len(paths)), mp_context=get_context("spawn")) as pool:
            for table in pool.map(scan_shard, paths):
                yield table
                bar.update()


def write_index(folder: Path, tables: list[ShardTable]) -> str:
    """Write the arrays to a temporary sibling, then put them in place of `index/`."""
    extensions = sorted({row[3] for table in tables for row in table.members})
    if len(extensions) > _MAX_EXTENSIONS:
        raise InputError(f"{folder}: {len(extensions)} different extensions; this is not a shard set")
    arrays = _arrays(tables, {extension: code for code, extension in enumerate(extensions)})
    shards = [{"name": table.name, "num_bytes": table.num_bytes, "num_samples": len(table.keys)} for table in tables]
    meta: dict[str, Any] = {"version": INDEX_VERSION, "shards": shards, "extensions": extensions}
    meta["fingerprint"] = _fingerprint(meta, arrays)
    temporary = folder / f".{INDEX_FOLDER}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, array in arrays.items():
        np.save(temporary / f"{name}.npy", array, allow_pickle=False)
    meta["array_bytes"] = {name: (temporary / f"{name}.npy").stat().st_size for name in arrays}
    (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    final = folder / INDEX_FOLDER
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    return str(meta["fingerprint"])


def _arrays(tables: list[ShardTable], codes: dict[str, int]) -> dict[str, NDArray[Any]]:
    keys = [key.encode("utf-8", "surrogateescape") for table in tables for key in table.keys]
    samples = np.zeros(len(keys) + 1, ARRAYS["samples"])
    counts = [count for table in tables for count in table.num_members]
    samples["first_member"][1:] = np.cumsum(counts, dtype=np.int64)
    samples["key_start"][1:] = np.cumsum([len(key) for key in keys], dtype=np.int64)
    rows = [
        (offset, size, crc32, codes[extension], width, height)
        for table in tables
        for offset, size, crc32, extension, width, height in table.members
    ]
    return {
        "samples": samples,
        "members": np.array(rows, dtype=ARRAYS["members"]),
        "keys": np.frombuffer(b"".join(keys), dtype=ARRAYS["keys"]),
    }


def _fingerprint(meta: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> str:
    """Changes with any byte of any sample, with keys and with the shards' names; not with where the set lies."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in ARRAYS:
        digest.update(name.encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()[:32]
