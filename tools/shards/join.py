"""Sets that several machines made -> one set: their tars under new names, and one index made of theirs.

    OUT/part-0000/{shard-000000.tar, ..., index/}  --+
    OUT/part-0001/{shard-000000.tar, ..., index/}  --+-->  OUT/{part-0000-shard-000000.tar, ..., index/}

No tar is read again. It may be interrupted, and run by several machines at once: tars are renamed one by one, and the
parts' own indexes go last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.index import ARRAYS, QUARANTINE_FILE
from data_pipeline.index_build import write_arrays
from data_pipeline.index_meta import INDEX_FOLDER, META_FILE, IndexMeta, read_meta
from models.common.errors import InputError
from models.common.files import is_inside, read_lines, write_bytes

Arrays = dict[str, NDArray[Any]]


def part_name(number: int) -> str:
    """The directory of a part within the set."""
    return f"part-{number:04d}"


def join_parts(out: Path, num_parts: int) -> bool:
    """Make one set of its parts; False where some of them are not there yet.

    Raises:
        InputError: a part is no shard set, or its tars are not those of its index.
    """
    if (out / META_FILE).is_file():
        _remove_parts(out, num_parts)  # what an interrupted one has left
        return True
    parts = [out / part_name(number) for number in range(num_parts)]
    if not all((part / META_FILE).is_file() for part in parts):
        return False
    metas = [read_meta(part, ARRAYS) for part in parts]
    for part, meta in zip(parts, metas, strict=True):
        for shard in meta["shards"]:
            _take(part / shard["name"], out / f"{part.name}-{shard['name']}", shard["num_bytes"])
    _join_quarantines(out, parts)
    extensions = sorted({name for meta in metas for name in meta["extensions"]})
    shards = [
        {**shard, "name": f"{part.name}-{shard['name']}"}
        for part, meta in zip(parts, metas, strict=True)
        for shard in meta["shards"]
    ]
    write_arrays(out, _joined(parts, metas, extensions), shards, extensions)
    _remove_parts(out, num_parts)
    return True


def _take(tar: Path, target: Path, num_bytes: int) -> None:
    """Move a tar of a part into the set; it may be there already."""
    with suppress(FileNotFoundError):
        tar.rename(target)
    if not target.is_file() or target.stat().st_size != num_bytes:
        raise InputError(f"{tar}: not there as its index says; remove {tar.parent} and make that part again")


def _joined(parts: Sequence[Path], metas: Sequence[IndexMeta], extensions: Sequence[str]) -> Arrays:
    """The arrays of all parts end to end."""
    codes = {name: code for code, name in enumerate(extensions)}
    found: dict[str, list[NDArray[Any]]] = {name: [] for name in ARRAYS}
    num_members = num_bytes = 0
    for part, meta in zip(parts, metas, strict=True):
        arrays = {name: np.load(part / INDEX_FOLDER / f"{name}.npy", allow_pickle=False) for name in ARRAYS}
        samples, members = arrays["samples"], arrays["members"]
        samples["first_member"] += np.uint64(num_members)
        samples["key_start"] += np.uint64(num_bytes)
        members["extension"] = np.array([codes[name] for name in meta["extensions"]], "<u2")[members["extension"]]
        num_members, num_bytes = num_members + len(members), num_bytes + len(arrays["keys"])
        found["samples"].append(samples if part == parts[-1] else samples[:-1])  # the last row ends the one before it
        found["members"].append(members)
        found["keys"].append(arrays["keys"])
    return {name: np.concatenate(each) for name, each in found.items()}


def _join_quarantines(out: Path, parts: Sequence[Path]) -> None:
    lines = [
        {**line, "shard": f"{part.name}-{line['shard']}"}
        for part in parts
        for line in read_lines(part / QUARANTINE_FILE)
        if is_inside(line["shard"])
    ]
    if lines:
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        write_bytes(out / QUARANTINE_FILE, text.encode(errors="backslashreplace"))


def _remove_parts(out: Path, num_parts: int) -> None:
    for number in range(num_parts):
        shutil.rmtree(out / part_name(number), ignore_errors=True)
