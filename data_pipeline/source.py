"""A recipe's `path` -> an opened index: a set or some of its tars, local or remote.

Owns the expansion of braces. `data_pipeline.index` reads; `data_pipeline.remote` copies.

    data/set                               every tar of the set
    data/set/train-{000000..000009}.tar    these tars of it; the index next to them is that of the whole set
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from data_pipeline.config import SourceConfig
from data_pipeline.index import ShardIndex
from data_pipeline.index_meta import META_FILE
from data_pipeline.remote import RemoteSet, default_cache, is_remote
from models.common.errors import InputError

_MAX_TARS = 1_000_000
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")


def open_index(source: SourceConfig) -> ShardIndex:
    """Open a source's index, local or remote.

    Raises:
        InputError: no set there, no index, braces that cannot be expanded, or a tar that the index lacks.
    """
    place, selection = split_path(source.path)
    if not is_remote(place):
        return ShardIndex.open(place, selection=selection)
    cache = Path(source.cache) if source.cache is not None else default_cache()
    remote = RemoteSet.at(place, cache, int(source.cache_gb * 1e9))
    remote.refresh(META_FILE)
    return ShardIndex.open(remote.folder, remote, selection)


def split_path(path: str) -> tuple[str, tuple[str, ...] | None]:
    """The set that a path names and the selected tars; None: all. Braces expand as in webdataset.

    Raises:
        InputError: unbalanced braces, more tars than any set has, or tars of several sets.
    """
    if not path.endswith((".tar", "}")):
        return path, None
    from braceexpand import braceexpand

    ranges = [abs(int(last) - int(first)) for first, last in _RANGE.findall(path)]
    try:
        # a range is expanded as a whole, so one that is too long must not be begun
        paths = list(islice(braceexpand(path), _MAX_TARS + 1)) if max(ranges, default=0) < _MAX_TARS else []
    except ValueError as error:
        raise InputError(f"{path}: its braces cannot be expanded ({error})") from None
    if not 0 < len(paths) <= _MAX_TARS:
        raise InputError(f"{path} names more than {_MAX_TARS} tars")
    parts = [each.rpartition("/") for each in paths]
    folders = sorted({folder or "." for folder, _, _ in parts})
    if len(folders) != 1 or not all(name.endswith(".tar") for _, _, name in parts):
        raise InputError(f"{path} names more than tars of one set; give each set a source of its own")
    return folders[0], tuple(name for _, _, name in parts)
