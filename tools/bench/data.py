"""`python -m tools.bench.data`: the data pipeline against webdataset and the Hugging Face CLIP processor.

    tar reading        samples per core-second, checksums included    peer: webdataset.WebDataset
    JPEG -> 336 x 336  pictures per core-second                       peer: CLIPImageProcessorPil (Pillow)
    the whole loader   samples per second with two worker processes   peer: webdataset, that processor, DataLoader
    packing            share of a 4,096-token batch that is padding   peer: padding 16 random rows to the longest

Owns what is compared; `tools.bench.measure` owns how. Without --photos it draws pictures of its own.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import InputError, run_cli

if TYPE_CHECKING:
    from data_pipeline.index import ShardIndex
    from tools.bench.measure import Row

SIZE = 336
SIZES = [(640, 480), (1024, 768), (4000, 3000)]
PACKAGES = ["webdataset", "transformers", "pillow", "torch", "numpy"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def main(argv: list[str]) -> int:
    """Run all comparisons and write runs/bench/data.json."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.data", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs; drawn ones by default")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=400, help="in the shards that are read and loaded")
    arguments = parser.parse_args(argv)

    from tools.bench.measure import report

    payloads = list(_jpegs(arguments.photos, arguments.samples))
    with tempfile.TemporaryDirectory() as folder:
        index = _make_set(Path(folder), payloads)
        rows = [
            *_tar_rows(index, arguments.rounds),
            *_picture_rows(payloads[0], arguments.rounds),
            *_loader_rows(index, max(2, arguments.rounds // 4)),
            _packing_row(),
        ]
    report("data", rows)
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
    return _as_jpeg(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))


def _as_jpeg(picture: Any) -> bytes:
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _make_set(folder: Path, payloads: list[bytes]) -> ShardIndex:
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


def _paths(index: ShardIndex) -> list[str]:
    return [str(index.folder / name) for name in index.shard_names]


def _tar_rows(index: ShardIndex, rounds: int) -> list[Row]:
    import webdataset as wds

    from tools.bench.measure import compare, per_core_second

    def peer() -> int:
        return sum(1 for _ in wds.WebDataset(_paths(index), shardshuffle=False))

    def ours() -> int:
        return sum(1 for sample in range(len(index)) if index.read(sample))

    unit = "samples per core-second"
    return [
        compare(
            "tar reading, A/A (peer twice)", unit, *map(per_core_second, (peer, peer)), rounds=rounds, packages=PACKAGES
        ),
        compare("tar reading, checksums", unit, *map(per_core_second, (ours, peer)), rounds=rounds, packages=PACKAGES),
    ]


def _clip_processor() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=square, image_mean=list(MEAN), image_std=list(STD)
    )


def _image_spec() -> Any:
    from models.spec import CropImage, ImageSpec

    return ImageSpec(size=SIZE, patch_size=14, fit=CropImage(), mean=MEAN, std=STD)


def _picture_rows(photo: bytes, rounds: int) -> list[Row]:
    import numpy as np
    from PIL import Image

    from data_pipeline.images import fit, open_picture
    from tools.bench.measure import compare, per_core_second

    processor, spec = _clip_processor(), _image_spec()
    source = open_picture(photo)
    found: list[Row] = []
    for width, height in SIZES:
        payload = _as_jpeg(source.resize((width, height), Image.Resampling.BICUBIC))
        times = max(1, 2_000_000 // (width * height))

        def peer(payload: bytes = payload, times: int = times) -> int:
            for _ in range(times):
                processor(Image.open(io.BytesIO(payload)), return_tensors="np")
            return times

        for what, at_least in (("exact", None), ("scaled", SIZE)):

            def ours(payload: bytes = payload, times: int = times, at_least: int | None = at_least) -> int:
                for _ in range(times):
                    fit(open_picture(payload, at_least=at_least), spec)
                return times

            exact = fit(open_picture(payload), spec).astype(int)
            difference = np.abs(exact - fit(open_picture(payload, at_least=at_least), spec)).mean()
            name = f"JPEG {width}x{height} -> {SIZE}, {what} (mean pixel difference {difference:.2f} of 255)"
            unit = "pictures per core-second"
            rates = map(per_core_second, (ours, peer))
            found.append(compare(name, unit, *rates, rounds=rounds, packages=PACKAGES))
    return found


def _loader_rows(index: ShardIndex, rounds: int) -> list[Row]:
    """Wall-clock rates: two processes at work; starting them is not counted."""
    from tools.bench.measure import compare

    unit = "samples per second, 2 workers"
    peer = partial(_peer_loader, index)
    return [
        compare(
            f"whole loader, {jpeg}", unit, partial(_our_loader, index, jpeg), peer, rounds=rounds, packages=PACKAGES
        )
        for jpeg in ("exact", "scaled")
    ]


_ROWS = 16


def _our_loader(index: ShardIndex, jpeg: Any) -> float:
    from data_pipeline.batch import collate
    from data_pipeline.build import open_stream
    from data_pipeline.config import DataConfig, PlainTemplate, SourceConfig
    from models.spec import IMAGE_TOKEN, TextSpec

    tokenizer = _byte_tokenizer()
    text = TextSpec(
        max_length=1024,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pad_token_id=tokenizer.eos_token_id,
        vocab_size=len(tokenizer),
    )
    source = SourceConfig(path=str(index.folder))
    config = DataConfig(sources=(source,), template=PlainTemplate(), max_length=1024, num_workers=2, jpeg=jpeg)
    stream = open_stream(
        config,
        tokenizer=tokenizer,
        image=_image_spec(),
        text=text,
        seed=0,
        num_slots=_ROWS,
        slots=range(_ROWS),
        epochs=1,
        quarantine=None,
    )
    collate(stream.next_rows(), text)
    start, count = time.perf_counter(), 0
    while not stream.exhausted:
        count += collate(stream.next_rows(), text).num_samples
    rate = count / (time.perf_counter() - start)
    stream.close()
    return rate


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from models.spec import IMAGE_TOKEN

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: place for place, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


class _Preprocess:
    """The peer's step: a picture through the stock processor."""

    def __init__(self) -> None:
        self.processor = _clip_processor()

    def __call__(self, sample: dict[str, Any]) -> tuple[Any, str]:
        return self.processor(sample["jpg"], return_tensors="pt")["pixel_values"][0], sample["txt"]


def _peer_loader(index: ShardIndex) -> float:
    import torch
    import webdataset as wds

    dataset = wds.WebDataset(_paths(index), shardshuffle=False).decode("pil").map(_Preprocess())
    loader = torch.utils.data.DataLoader(dataset, batch_size=_ROWS, num_workers=2)
    batches = iter(loader)
    next(batches)
    start, count = time.perf_counter(), 0
    for pixels, _ in batches:
        count += len(pixels)
    return count / (time.perf_counter() - start)


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
