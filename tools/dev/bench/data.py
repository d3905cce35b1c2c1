"""`python -m tools.bench.data`: the data pipeline against webdataset and the Hugging Face CLIP processor.

    tar reading        samples per core-second, checksums included    peer: webdataset.WebDataset
    JPEG -> 336 x 336  images per core-second                       peer: CLIPImageProcessorPil (Pillow)
    the whole loader   samples per second with two worker processes   peer: webdataset, that processor, DataLoader
    resuming           CPU time to the first rows at draw 1,000,000   peer: the same at draw 0
    packing            share of a 4,096-token batch that is padding   peer: padding 16 random rows to the longest
    opening an index   seconds and memory for 10 million samples      peer: the limits

Owns the table, tar reading and packing. `tools.dev.bench.photos` makes the shards that are read, `.images`, `.loading`
and `.index` measure their own, `.measure` compares two. Without --photos the images are drawn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from models.common.errors import run_cli

if TYPE_CHECKING:
    from data_pipeline.index import ShardIndex
    from tools.dev.bench.measure import Row

MAX_NOISE = 0.05
"""Largest allowed deviation from 1 of the peer's ratio to itself."""


def main(argv: list[str]) -> int:
    """Run all comparisons and write runs/bench/data.json; 1 means that the machine was too busy for them to count."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.data", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs; drawn ones by default")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=400, help="in the shards that are read and loaded")
    arguments = parser.parse_args(argv)

    from tools.dev.bench.images import image_rows
    from tools.dev.bench.index import index_rows
    from tools.dev.bench.loading import loader_rows, resume_row
    from tools.dev.bench.measure import report
    from tools.dev.bench.photos import jpegs, make_set

    payloads = list(jpegs(arguments.photos, arguments.samples))
    with tempfile.TemporaryDirectory() as folder:
        index = make_set(Path(folder), payloads)
        rows = [
            *_tar_rows(index, arguments.rounds),
            *image_rows(payloads, arguments.rounds),
            *loader_rows(index, max(2, arguments.rounds // 4)),
            resume_row(make_set(Path(folder) / "alike", payloads[:1] * len(payloads)), arguments.rounds),
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


def _tar_rows(index: ShardIndex, rounds: int) -> list[Row]:
    import webdataset as wds

    from tools.dev.bench.measure import compare, per_core_second
    from tools.dev.bench.photos import PACKAGES, paths_of

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
    from data_pipeline.sample import Encoded, SampleRef
    from tools.dev.bench.measure import row
    from tools.dev.bench.photos import PACKAGES

    generator = np.random.default_rng(0)
    text = np.minimum(np.exp(generator.normal(5.0, 0.9, 20_000)).astype(int) + 20, 1400)
    lengths = text + 576 * (generator.random(20_000) < 0.9)
    no_tiles = np.zeros((0, 1, 1, 3), dtype=np.uint8)
    samples = iter(
        Encoded(SampleRef(0, n, 0, n, "", ""), ids := np.zeros(length, dtype=np.int32), ids, no_tiles)
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
