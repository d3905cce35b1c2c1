"""`python -m tools.bench.data`: the data pipeline against webdataset and the Hugging Face CLIP processor.

    tar reading        samples per core-second, checksums included    peer: webdataset.WebDataset
    JPEG -> 336 x 336  pictures per core-second                       peer: CLIPImageProcessorPil (Pillow)
    the whole loader   samples per second with two worker processes   peer: webdataset, that processor, DataLoader
    resuming           CPU time to the first rows at draw 1,000,000   peer: the same at draw 0
    packing            share of a 4,096-token batch that is padding   peer: padding 16 random rows to the longest
    opening an index   seconds and memory for 10 million samples      peer: what they may be

Owns the set that is read, tar reading and packing; `tools.bench.pictures`, `.loading` and `.index` own theirs,
`.measure` how two are compared. Without --photos it draws pictures of its own.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import InputError, run_cli

if TYPE_CHECKING:
    from PIL import Image

    from data_pipeline.index import ShardIndex
    from tools.bench.measure import Row

MAX_NOISE = 0.05
"""How far the ratio of the peer to itself may lie from 1."""

PACKAGES = ["webdataset", "transformers", "pillow", "torch", "numpy"]


def main(argv: list[str]) -> int:
    """Run all comparisons and write runs/bench/data.json; 1 means that the machine was too busy for them to count."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.data", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs; drawn ones by default")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=400, help="in the shards that are read and loaded")
    arguments = parser.parse_args(argv)

    from tools.bench.index import index_rows
    from tools.bench.loading import loader_rows, resume_row
    from tools.bench.measure import report
    from tools.bench.pictures import picture_rows

    payloads = list(_jpegs(arguments.photos, arguments.samples))
    with tempfile.TemporaryDirectory() as folder:
        index = _make_set(Path(folder), payloads)
        rows = [
            *_tar_rows(index, arguments.rounds),
            *picture_rows(payloads, arguments.rounds),
            *loader_rows(index, max(2, arguments.rounds // 4)),
            resume_row(_make_set(Path(folder) / "alike", payloads[:1] * len(payloads)), arguments.rounds),
            _packing_row(),
            *index_rows(),
        ]
    report("data", rows)
    if abs(rows[0].ratio - 1) > MAX_NOISE:
        print(
            f"the peer against itself is {rows[0].ratio:.2f}: the machine is too busy, measure again", file=sys.stderr
        )
        return 1
    return 0


def _jpegs(folder: Path | None, count: int) -> Iterator[bytes]:
    """`count` JPEG files, from a folder (again from its start where it holds fewer) or drawn."""
    if folder is None:
        yield from map(_drawn, range(count))
        return
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise InputError(f"{folder} holds no JPEGs")
    for number in range(count):
        yield paths[number % len(paths)].read_bytes()


def _drawn(seed: int) -> bytes:
    """A picture with the smooth areas and edges of a photograph, 640 x 480."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    fine = generator.normal(0, 6, (480, 640, 1))
    pixels = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC)) + fine
    return as_jpeg(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))


def as_jpeg(picture: Image.Image) -> bytes:
    """A picture as a camera would store it."""
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _make_set(folder: Path, payloads: list[bytes]) -> ShardIndex:
    folder.mkdir(exist_ok=True)
    import webdataset as wds

    from data_pipeline.index import ShardIndex
    from data_pipeline.index_build import build_index

    half = -(-len(payloads) // 2)  # two tars: the peer's loader gives each of its two workers whole shards
    for start in range(0, len(payloads), half):
        with (folder / f"{start:06d}.tar").open("wb") as stream, wds.TarWriter(stream, encoder=False) as writer:
            for number, payload in enumerate(payloads[start : start + half], start=start):
                writer.write({"__key__": f"{number:06d}", "jpg": payload, "txt": f"caption {number}".encode()})
    build_index(folder)
    return ShardIndex(folder)


def paths_of(index: ShardIndex) -> list[str]:
    """The tars of a set."""
    return [str(index.folder / name) for name in index.shard_names]


def _tar_rows(index: ShardIndex, rounds: int) -> list[Row]:
    import webdataset as wds

    from tools.bench.measure import compare, per_core_second

    def peer() -> int:
        return sum(1 for _ in wds.WebDataset(paths_of(index), shardshuffle=False))

    def ours() -> int:
        return sum(1 for sample in range(len(index)) if index.read(sample))

    unit = "samples per core-second"
    return [
        compare(
            "tar reading, A/A (peer twice)", unit, *map(per_core_second, (peer, peer)), rounds=rounds, packages=PACKAGES
        ),
        compare("tar reading, checksums", unit, *map(per_core_second, (ours, peer)), rounds=rounds, packages=PACKAGES),
    ]


def _packing_row() -> Row:
    """Lengths as LLaVA-1.5's mixture has them: 576 image tokens for nine in ten, and a text with a long tail."""
    import numpy as np

    from data_pipeline.config import RowPacking
    from data_pipeline.packing import Packer
    from data_pipeline.sample import Draw, Encoded
    from tools.bench.measure import row

    generator = np.random.default_rng(0)
    text = np.minimum(np.exp(generator.normal(5.0, 0.9, 20_000)).astype(int) + 20, 1400)
    lengths = text + 576 * (generator.random(20_000) < 0.9)
    no_tiles = np.zeros((0, 1, 1, 3), dtype=np.uint8)
    samples = iter(
        Encoded(Draw(0, n), "", "", ids := np.zeros(length, dtype=np.int32), ids, no_tiles)
        for n, length in enumerate(lengths)
    )
    packer, num_rows = Packer(RowPacking(row_tokens=4096)), 0
    while packer.next_row(lambda: next(samples, None)):
        num_rows += 1
    ours = 100 * (1 - lengths.sum() / (num_rows * 4096))
    batches = lengths.reshape(-1, 16)
    peer = 100 * (1 - lengths.sum() / (batches.max(axis=1) * 16).sum())
    return row("padding: packed at 4,096 tokens, 8 waiting", "% of positions", float(ours), float(peer), PACKAGES)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
