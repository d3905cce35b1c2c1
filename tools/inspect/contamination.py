"""Pictures of benchmarks in training data: `sightline contamination SUITE.yaml --shards SET ... --out FOUND.json`.

    pictures of the suite ──sha256, difference hash──┐
    images of the shards  ──sha256, difference hash──┴─▶ equal files, and pictures that look alike

Owns: the hashes and the matching. A difference hash is 64 bits of a picture of 9 x 8 grey pixels (is each brighter than
its right neighbour); sizes, formats and slight cuts leave it nearly the same. A picture that looks alike is a hint to
look at, not a proof: the report names both.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_pipeline.images import open_image
from models.common.errors import InputError, run_cli

if TYPE_CHECKING:
    from data_pipeline.index import ShardIndex

Hashes = npt.NDArray[np.uint64]

MAX_DISTANCE = 4
"""Bits of 64 in which two pictures that look alike may differ."""
_WIDTH, _HEIGHT = 9, 8
_MIN_CONTRAST = 8
"""Grey levels: below it a picture is plain, and its hash says nothing."""
_CHUNK = 256


@dataclass(frozen=True)
class Match:
    """A picture of a benchmark and an image of the shards; `distance` is None where the files are equal."""

    task: str
    picture: str
    shard: str
    key: str
    distance: int | None


@dataclass(frozen=True)
class Looks:
    """What is compared of one image; `bits` is None where it is too plain to tell."""

    digest: str
    bits: int | None


def looks_of(content: bytes) -> Looks:
    """The hashes of an image's file; raises ImageError where it is none."""
    digest = hashlib.sha256(content).hexdigest()
    grey = open_image(content, at_least=4 * _WIDTH).convert("L").resize((_WIDTH, _HEIGHT))
    pixels = np.asarray(grey, dtype=np.int16)
    if int(pixels.max()) - int(pixels.min()) < _MIN_CONTRAST:
        return Looks(digest, None)
    is_brighter = (pixels[:, :-1] > pixels[:, 1:]).ravel()
    return Looks(digest, int(np.packbits(is_brighter).view(">u8")[0]))


def main(argv: list[str]) -> int:
    """Hash both sides, print how many were found, and write which; exit code 0 whatever was found."""
    arguments = _parser().parse_args(argv)
    from eval.run import prepare, suite_configs

    pictures = pictures_of(prepare(suite_configs(arguments.suite)))
    found = list(matches(pictures, arguments.shards, jobs=arguments.jobs, max_distance=arguments.max_distance))
    report = {"num_pictures": len(pictures), "matches": [asdict(match) for match in found]}
    for task in dict.fromkeys(task for task, _ in pictures):
        own = [match for match in found if match.task == task]
        equal, alike = ({match.picture for match in own if (match.distance is None) == is_equal} for is_equal in (1, 0))
        total = sum(name == task for name, _ in pictures)
        print(
            f"{task}: of {total} pictures {len(equal)} are in the shards as they are, {len(alike - equal)} look alike"
        )
    if arguments.out is not None:
        from models.common.files import write_json

        write_json(arguments.out, report)
    return 0


def pictures_of(tasks: Sequence[Any]) -> dict[tuple[str, str], Looks]:
    """The looks of each picture of each task, by the task's name and the picture's.

    Raises:
        InputError: a task shows no pictures of its own (image gain, retrieval).
    """
    from eval.images import content_of
    from eval.tasks.asked import AskedTask

    found = {}
    for task in tasks:
        if not isinstance(task, AskedTask):
            raise InputError(f"{task.name}: its pictures are not compared; name a task that asks about pictures")
        for picture in dict.fromkeys(task.pictures):
            if picture is not None:
                name = str(picture) if isinstance(picture, Path) else picture.name
                found[task.name, name] = looks_of(content_of(picture))
    return found


def matches(
    pictures: Mapping[tuple[str, str], Looks], shards: Sequence[str], *, jobs: int = 1, max_distance: int = MAX_DISTANCE
) -> Iterator[Match]:
    """Every image of the shards that is one of the pictures or looks like one, in the shards' order.

    A sample that cannot be read is passed over: training does not see it either.
    """
    from tqdm import tqdm

    from data_pipeline.config import SourceConfig
    from data_pipeline.source import open_index

    names = list(pictures)
    by_digest: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        by_digest.setdefault(pictures[name].digest, []).append(place)
    told = [place for place, name in enumerate(names) if pictures[name].bits is not None]
    bits = np.array([pictures[names[place]].bits for place in told], dtype=np.uint64)
    for path in shards:
        index = open_index(SourceConfig(path=path))
        with tqdm(total=len(index), desc=path, unit="sample", leave=False) as bar:
            for samples, looked in _looked(index, jobs):
                for sample, looks in zip(samples, looked, strict=True):
                    for each in looks:
                        equal = by_digest.get(each.digest, [])
                        where = (index.shard_of(sample), index.key_of(sample))
                        yield from (Match(*names[place], *where, None) for place in equal)
                        for place, distance in _near(bits, each, max_distance):
                            if told[place] not in equal:
                                yield Match(*names[told[place]], *where, distance)
                bar.update(len(samples))


def _near(bits: Hashes, looks: Looks, max_distance: int) -> Iterator[tuple[int, int]]:
    """The places whose hash differs in few bits, and in how many."""
    if looks.bits is None or not len(bits):
        return
    differing = (bits ^ np.uint64(looks.bits)).view(np.uint8).reshape(-1, 8)
    distances = np.unpackbits(differing, axis=1).sum(axis=1)
    for place in np.flatnonzero(distances <= max_distance):
        yield int(place), int(distances[place])


def _looked(index: ShardIndex, jobs: int) -> Iterator[tuple[range, list[list[Looks]]]]:
    chunks = [range(start, min(start + _CHUNK, len(index))) for start in range(0, len(index), _CHUNK)]
    if jobs <= 1 or len(chunks) <= 1:
        yield from ((chunk, look_at(index, chunk)) for chunk in chunks)
        return
    with ProcessPoolExecutor(min(jobs, len(chunks)), mp_context=get_context("spawn")) as pool:
        yield from zip(chunks, pool.map(partial(look_at, index), chunks), strict=True)


def look_at(index: ShardIndex, samples: range) -> list[list[Looks]]:
    """The looks of the images of each of these samples; none of a sample that cannot be read."""
    from data_pipeline.record import image_extensions

    found = []
    for sample in samples:
        try:
            files = index.read(sample)
            found.append([looks_of(files[extension]) for extension in image_extensions(files)])
        except InputError:
            found.append([])
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sightline contamination", description="Look for pictures of benchmarks in training data."
    )
    add = parser.add_argument
    add("suite", type=Path, help="a suite of eval.run: whose pictures are looked for")
    add("--shards", nargs="+", required=True, metavar="SET", help="shard sets, as a recipe names them")
    add("--max-distance", type=int, default=MAX_DISTANCE, help="bits of 64 that may differ; default 4")
    add("--jobs", type=int, default=1, help="processes")
    add("--out", type=Path, help="write the matches as JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
