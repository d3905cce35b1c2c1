"""Reads every sample of a set as training would, and says which cannot be used.

Owns the walk; what makes a sample unusable is decided where it is read (`data_pipeline.index`, `.record`, `.images`).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from data_pipeline.images import open_picture
from data_pipeline.index import ShardIndex
from data_pipeline.record import read_record
from models.errors import InputError

_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Broken:
    """A sample that cannot be used."""

    shard: str
    key: str
    reason: str


def broken_samples(index: ShardIndex, *, jobs: int = 1, progress: bool = False) -> Iterator[Broken]:
    """Every broken sample, in the order of the set."""
    from tqdm import tqdm

    chunks = [range(start, min(start + _CHUNK, len(index))) for start in range(0, len(index), _CHUNK)]
    with tqdm(total=len(index), desc="check", unit="sample", disable=not progress) as bar:
        if jobs <= 1 or len(chunks) == 1:
            for chunk in chunks:
                yield from check_range(index, chunk)
                bar.update(len(chunk))
            return
        with ProcessPoolExecutor(min(jobs, len(chunks)), mp_context=get_context("spawn")) as pool:
            for chunk, found in zip(chunks, pool.map(partial(check_range, index), chunks), strict=True):
                yield from found
                bar.update(len(chunk))


def check_range(index: ShardIndex, samples: range) -> list[Broken]:
    """The broken samples among some of a set."""
    found = []
    for sample in samples:
        try:
            for picture in read_record(index.read(sample)).pictures:
                open_picture(picture)
        except InputError as error:
            found.append(Broken(index.shard_of(sample), index.key_of(sample), str(error)))
    return found
