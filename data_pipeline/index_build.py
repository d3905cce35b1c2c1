"""Builds the index of a shard set in one pass over its tars, several tars at a time.

Owns the grouping of members into samples, which samples are left out because they cannot be used, and the set's
fingerprint. `data_pipeline.index` owns the layout.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.image_kinds import IMAGE_EXTENSIONS, image_kind
from data_pipeline.images import header_size
from data_pipeline.index import ARRAYS, QUARANTINE_FILE
from data_pipeline.index_meta import INDEX_FOLDER, INDEX_VERSION
from data_pipeline.record import images_problem
from data_pipeline.tar import TarError, TarMember, read_members
from models.common.errors import InputError, single_line
from models.common.files import new_directory, write_bytes

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
"""WebDataset's own split: the key ends at the first dot of the file name."""

_NUMBERED_TEXT = re.compile(r"^[0-9]+[.](txt|json)$")

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
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(key, reason) of each sample that cannot be used."""
    breaks_off: bool = False
    """Whether the tar cannot be read after the last sample; the last of `left_out` gives place and reason."""


@dataclass(slots=True)
class _Group:
    """The members of one sample, in the tar's order."""

    key: str
    problem: str = ""
    is_repeated: bool = False
    """Whether the key came again with members that it had already; those are left out, the first ones stay."""
    members: list[tuple[int, int, int, str, int, int]] = field(default_factory=list)
    heads: dict[str, bytes] = field(default_factory=dict)
    """The first bytes of each member, by extension: what it is, whatever its name says."""


def scan_shard(path: Path) -> ShardTable:
    """Read one tar once: its samples' locations and checksums, and the sizes of their images.

    A sample is left out and named if a name leaves the archive, a key or member is repeated, a member is a link, or no
    reader can use its images. Where the tar is cut short, so is the sample at the cut, since it may have lost members.
    The members of a sample need not be adjacent: tars sorted by extension hold all images before all texts.
    """
    table, groups, last = ShardTable(path.name, 0), dict[str, _Group](), ""
    try:
        table.num_bytes = path.stat().st_size
        with path.open("rb", buffering=0) as stream:
            for member in read_members(path):
                key, extension = _split(member.name)
                if not extension:
                    continue
                group = groups.setdefault(key, _Group(key))
                if key != last and extension in group.heads:
                    table.left_out.append((key, f"the key {key!r} comes twice in the tar"))
                    group.is_repeated = True
                last = key
                if not (group.is_repeated and extension in group.heads):
                    _add_member(group, extension, member, stream.fileno())
        if not groups:
            table.left_out.append(("", "the tar holds no samples (files named KEY.EXTENSION)"))
    except (TarError, OSError) as error:
        _break_off(table, groups, last, str(error).removeprefix(f"{path}: "))
    except Exception as error:  # one tar never costs the others
        _break_off(table, groups, last, f"{type(error).__name__}: {single_line(error)}")
    for group in groups.values():
        _close_group(table, group)
    return table


def _break_off(table: ShardTable, groups: dict[str, _Group], last: str, reason: str) -> None:
    """Name the sample at which a tar breaks off; whatever of it was read may not be all."""
    groups.pop(last, None)
    table.breaks_off = True
    table.left_out.append((last, reason))


def _split(name: str) -> tuple[str, str]:
    """(key, extension) of a member; without an extension where it belongs to no sample."""
    match = _NAME.match(name)
    if match is None or name.startswith("__MACOSX/"):
        return "", ""
    return match[1], match[2].lower()


def _add_member(group: _Group, extension: str, member: TarMember, descriptor: int) -> None:
    group.problem = group.problem or member.problem or _problem(group, extension, member)
    if group.problem:
        return
    payload = os.pread(descriptor, member.size, member.offset)
    group.heads[extension] = payload[:32]
    is_image = extension.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS or image_kind(payload[:32]) is not None
    width, height = header_size(io.BytesIO(payload)) if is_image else (0, 0)
    group.members.append((member.offset, member.size, zlib.crc32(payload), extension, width, height))


def _problem(group: _Group, extension: str, member: TarMember) -> str:
    """Why a member cannot be part of its sample; empty where it can."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"a member named {member.name!r}; names must stay inside the archive"
    if extension in (row[3] for row in group.members):
        return f"{member.name!r} comes twice"
    if member.size > _MAX_MEMBER_BYTES:
        return f"{member.name!r} has {member.size} bytes; at most {_MAX_MEMBER_BYTES} fit a sample"
    return ""


def _close_group(table: ShardTable, group: _Group) -> None:
    """Add a complete sample to the table, or add an incomplete one to `left_out`."""
    group.problem = group.problem or _several_samples(group) or images_problem(group.heads)
    if group.problem:
        table.left_out.append((group.key, group.problem))
    elif group.members:
        table.keys.append(group.key)
        table.num_members.append(len(group.members))
        table.members += group.members


def _several_samples(group: _Group) -> str:
    """What is wrong where a key ends too early: `photo.001.jpg` and `photo.002.jpg` both have the key `photo`."""
    texts = [name for name in group.heads if _NUMBERED_TEXT.match(name)]
    if len(texts) < 2:
        return ""
    return (
        f"{group.key}.{texts[0]} and {group.key}.{texts[1]} are one sample, since a key ends at the first dot; name"
        f" them {group.key.rsplit('/', 1)[-1]}_{texts[0]}"
    )


def build_index(folder: Path, *, jobs: int = 1, progress: bool = False, bad_share_limit: float = 0.05) -> str:
    """Index every `*.tar` of a directory and return the set's fingerprint. Replaces an older index at the end.

    Unusable samples are left out and listed in `quarantine.jsonl` next to the index (shard, key, reason), which exists
    only if there are any.

    Args:
        bad_share_limit: if more than this share of tars is cut short, or of samples is left out, that is an error.

    Raises:
        InputError: no tars, no samples, or more than that share cannot be used.
    """
    if not folder.is_dir():
        raise InputError(f"no directory {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".tar" and path.is_file())
    if not paths:
        raise InputError(f"{folder} holds no *.tar; nothing to index")
    tables = list(_scan_all(paths, jobs, progress))
    write_quarantine(folder, tables)
    _check_share(folder, tables, bad_share_limit)
    return write_index(folder, tables)


def write_quarantine(folder: Path, tables: list[ShardTable]) -> None:
    """Write the list of what is left out, or remove an older list."""
    lines = [
        json.dumps({"shard": table.name, "key": key, "reason": reason}, ensure_ascii=False)
        for table in tables
        for key, reason in table.left_out
    ]
    path = folder / QUARANTINE_FILE
    if not lines:
        path.unlink(missing_ok=True)
        return
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))


def _check_share(folder: Path, tables: list[ShardTable], limit: float) -> None:
    """Raise InputError where too much of the set is left out."""
    num_broken = sum(table.breaks_off or not table.keys for table in tables)
    num_samples, num_left_out = (
        sum(map(len, lists)) for lists in zip(*((t.keys, t.left_out) for t in tables), strict=True)
    )
    worst = max(num_broken / len(tables), num_left_out / (num_samples + num_left_out))
    if worst <= limit and num_samples:
        return
    table = next(table for table in tables if table.left_out)
    key, reason = table.left_out[0]
    raise InputError(
        f"{folder}: {num_broken} of {len(tables)} tars break off or hold nothing, {num_left_out} samples cannot be"
        f" used; more than {limit:.0%}; the first: {table.name} {key}: {reason}. {folder / QUARANTINE_FILE} names them"
        " all: make them again or remove them"
    )


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
    """Replace `index/` by the new arrays."""
    extensions = sorted({row[3] for table in tables for row in table.members})
    if len(extensions) > _MAX_EXTENSIONS:
        raise InputError(f"{folder}: {len(extensions)} different extensions; this is not a shard set")
    arrays = _arrays(tables, {extension: code for code, extension in enumerate(extensions)})
    shards = [{"name": table.name, "num_bytes": table.num_bytes, "num_samples": len(table.keys)} for table in tables]
    return write_arrays(folder, arrays, shards, extensions)


def write_arrays(
    folder: Path, arrays: dict[str, NDArray[Any]], shards: list[dict[str, Any]], extensions: list[str]
) -> str:
    """Replace `index/` by these arrays; returns the set's fingerprint.

    Args:
        shards: name, num_bytes and num_samples of each, as meta.json has them, in the order of the samples.
        extensions: by their numbers in the members.
    """
    meta: dict[str, Any] = {"version": INDEX_VERSION, "shards": shards, "extensions": extensions}
    meta["fingerprint"] = _fingerprint(meta, arrays)
    with new_directory(folder / INDEX_FOLDER, is_shared=True) as temporary:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        meta["array_bytes"] = {name: (temporary / f"{name}.npy").stat().st_size for name in arrays}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
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
    """A digest of every sample's bytes and key and of the shards' names; independent of the set's location."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in ARRAYS:
        digest.update(name.encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()[:32]
