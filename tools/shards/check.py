"""Reads every sample of a set as training would, and lists those that cannot be used.

Owns the walk; the readers decide what makes a sample unusable (`data_pipeline.index`, `.record`, `.images`).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from data_pipeline.images import open_image
from data_pipeline.index import ShardIndex
from data_pipeline.record import read_record
from models.common.errors import AwayError, InputError, single_line

_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Broken:
    """A sample that training could not use, and why."""

    shard: str
    key: str
    reason: str


def broken_samples(index: ShardIndex, *, jobs: int = 1, progress: bool = False) -> Iterator[Broken]:
    """Read every sample of a set, by `jobs` processes; yields the broken ones in the order of the set."""
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
    """Read the samples of one range; the broken ones among them."""
    found = []
    for sample in samples:
        try:
            for image in read_record(index.read(sample)).images:
                open_image(image)
        except InputError as error:
            found.append(Broken(index.shard_of(sample), index.key_of(sample), str(error)))
        except AwayError:
            raise
        except Exception as error:  # as in training, whatever a decoder raises costs the sample
            reason = f"{type(error).__name__}: {single_line(error)}"
            found.append(Broken(index.shard_of(sample), index.key_of(sample), reason))
    return found
