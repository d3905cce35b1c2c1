"""Samples -> a directory of WebDataset tars with its index, complete or absent.

Owns keys, shard names, bytes on disk and resuming. Equal samples give equal tars, byte for byte, whatever the number
of processes. Everything is made in a hidden sibling that becomes the set at the end; after a crash the finished shards
in it are kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from data_pipeline.image_kinds import extension_for
from data_pipeline.images import header_size, open_image
from data_pipeline.index_build import build_index
from models.common.errors import InputError
from models.common.files import new_file
from tools.shards.raw import RawSample


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One tar to be written: its samples carry the keys first_key, first_key + 1, …"""

    path: Path
    first_key: int
    samples: tuple[RawSample, ...]
    resize: int | None = None
    """Shorter side in pixels that larger images are shrunk to."""


def write_set(
    out: Path,
    samples: Sequence[RawSample],
    samples_per_shard: int,
    *,
    resize: int | None = None,
    jobs: int = 1,
    progress: bool = False,
) -> int:
    """Write and index a shard set; returns the number of shards.

    Args:
        resize: shrink images whose shorter side is longer than this, upright, to JPEGs of quality 95. Others, and all
            where it is None, are copied byte for byte.

    Raises:
        InputError: `out` exists, or a file that should be an image is none (named). Nothing is left behind then.
    """
    if out.exists():
        raise InputError(f"{out} exists already: choose another directory, or remove it first")
    if samples_per_shard < 1:
        raise InputError(f"--samples-per-shard {samples_per_shard}: at least 1")
    if resize is not None and resize < 1:
        raise InputError(f"--resize {resize}: at least 1 pixel")
    work = out.parent / f".{out.name}.making"
    _prepare(work, _digest(samples, samples_per_shard, resize))
    plans = [
        ShardPlan(work / f"shard-{number:06d}.tar", start, tuple(samples[start : start + samples_per_shard]), resize)
        for number, start in enumerate(range(0, len(samples), samples_per_shard))
    ]
    try:
        _write_all(plans, jobs, progress)
        build_index(work, jobs=jobs, progress=progress, bad_share_limit=0)
    except InputError:
        shutil.rmtree(work)
        raise
    (work / "plan").unlink()
    work.rename(out)
    return len(plans)


def _prepare(work: Path, digest: str) -> None:
    """Keep the finished shards of an interrupted run of the same samples; remove those of another."""
    mark = work / "plan"
    if work.exists() and not (mark.is_file() and mark.read_text() == digest):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    for unfinished in work.glob("*.tmp"):
        unfinished.unlink()
    mark.write_text(digest)


def _digest(samples: Sequence[RawSample], samples_per_shard: int, resize: int | None) -> str:
    """A digest of the texts, the images' names, sizes and times, and the writing options."""
    digest = hashlib.sha256(f"{samples_per_shard} {resize}".encode())
    for sample in samples:
        digest.update(json.dumps([sample.caption, sample.record], sort_keys=True).encode())
        for image in sample.images:
            if isinstance(image, bytes):
                digest.update(hashlib.sha256(image).digest())
                continue
            status = image.stat()
            digest.update(f"{image}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _write_all(plans: Sequence[ShardPlan], jobs: int, progress: bool) -> None:
    from tqdm import tqdm

    with tqdm(total=sum(len(plan.samples) for plan in plans), desc="write", unit="sample", disable=not progress) as bar:
        missing = [plan for plan in plans if not plan.path.exists()]
        bar.update(sum(len(plan.samples) for plan in plans if plan.path.exists()))
        for num_samples in _run(missing, jobs):
            bar.update(num_samples)


def _run(plans: Sequence[ShardPlan], jobs: int) -> Iterable[int]:
    if jobs <= 1 or len(plans) <= 1:
        yield from map(write_shard, plans)
        return
    with ProcessPoolExecutor(min(jobs, len(plans)), mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(write_shard, plans)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def write_shard(plan: ShardPlan) -> int:
    """Write one tar atomically; returns its number of samples."""
    from webdataset import TarWriter

    with (
        new_file(plan.path) as temporary,
        temporary.open("wb") as stream,
        TarWriter(stream, encoder=False, mtime=0) as writer,
    ):
        for number, sample in enumerate(plan.samples):
            writer.write({"__key__": f"{plan.first_key + number:09d}", **dict(_files(sample, plan.resize))})
    return len(plan.samples)


def _files(sample: RawSample, resize: int | None) -> Iterator[tuple[str, bytes]]:
    """The sample's files by extension."""
    for number, source in enumerate(sample.images):
        name, payload = (sample.where, source) if isinstance(source, bytes) else (str(source), source.read_bytes())
        suffix = "" if isinstance(source, bytes) else source.suffix.lower().lstrip(".")
        extension, size = extension_for(payload, suffix), header_size(io.BytesIO(payload))
        if size == (0, 0) or not extension:
            raise InputError(f"{name} is not an image that can be read")
        if resize is not None and min(size) > resize:
            extension, payload = "jpg", _shrunk(name, payload, resize)
        yield (extension if len(sample.images) == 1 else f"{number}.{extension}"), payload
    if sample.caption is not None:
        yield "txt", sample.caption.encode()
    if sample.record is not None:
        yield "json", json.dumps(sample.record, ensure_ascii=False, sort_keys=True).encode()


def _shrunk(name: str, payload: bytes, shorter_side: int) -> bytes:
    try:
        return shrink(payload, shorter_side)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def shrink(payload: bytes, shorter_side: int) -> bytes:
    """An encoded image with its shorter side at `shorter_side`, upright, as a JPEG of quality 95."""
    image = open_image(payload)
    scale = shorter_side / min(image.size)
    width, height = (max(shorter_side, round(side * scale)) for side in image.size)
    stream = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    return stream.getvalue()
