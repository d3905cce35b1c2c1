"""Whole loaders: ours against webdataset with the Hugging Face CLIP processor, and resuming late against early.

Owns both loaders. `tools.dev.bench.photos` makes the set they read, `.data` the table.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from tools.dev.bench.images import clip_processor, image_spec
from tools.dev.bench.photos import PACKAGES, paths_of

if TYPE_CHECKING:
    from data_pipeline.index import ShardIndex
    from data_pipeline.stream import RowStream
    from models.spec import TextSpec
    from tools.dev.bench.measure import Row


def loader_rows(index: ShardIndex, rounds: int) -> list[Row]:
    """Wall-clock rates: two processes at work; starting them is not counted."""
    from tools.dev.bench.measure import compare

    unit = "samples per second, 2 workers"
    peer = partial(_peer_loader, index)
    return [
        compare(
            f"whole loader, {jpeg}", unit, partial(_our_loader, index, jpeg), peer, rounds=rounds, packages=PACKAGES
        )
        for jpeg in ("exact", "scaled")
    ]


_ROWS = 16


def _open(index: ShardIndex, jpeg: Any, num_workers: int, epochs: int | None) -> tuple[RowStream, TextSpec]:
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
    config = DataConfig(
        sources=(source,), template=PlainTemplate(), max_length=1024, num_workers=num_workers, jpeg=jpeg
    )
    stream = open_stream(
        config,
        tokenizer=tokenizer,
        image=image_spec(),
        text=text,
        seed=0,
        num_slots=_ROWS,
        slots=range(_ROWS),
        epochs=epochs,
        quarantine=None,
    )
    return stream, text


def _our_loader(index: ShardIndex, jpeg: Any) -> float:
    from data_pipeline.batch import collate

    stream, text = _open(index, jpeg, num_workers=2, epochs=1)
    collate(stream.next_rows(), text)
    start, count = time.perf_counter(), 0
    while not stream.exhausted:
        count += collate(stream.next_rows(), text).num_samples
    rate = count / (time.perf_counter() - start)
    stream.close()
    return rate


def resume_row(index: ShardIndex, rounds: int) -> Row:
    """First rows after a state was loaded, of a set of equal samples: opening, loading and reading are all in it."""
    from tools.dev.bench.measure import compare, per_core_second

    def resumed(n: int) -> int:
        stream, _ = _open(index, "exact", num_workers=0, epochs=None)
        state = stream.state_dict()
        for slot in state["slots"].values():
            slot["next"] = n
        stream.load_state_dict(state)
        return len([row for row in stream.next_rows() if row])

    late, early = (per_core_second(partial(resumed, n)) for n in (1_000_000, 0))
    unit = "first rows per core-second"
    return compare("resumed at draw 1,000,000 (peer: at 0)", unit, late, early, rounds=rounds, packages=PACKAGES)


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
    """The peer's step: an image through the stock processor."""

    def __init__(self) -> None:
        self.processor = clip_processor()

    def __call__(self, sample: dict[str, Any]) -> tuple[Any, str]:
        return self.processor(sample["jpg"], return_tensors="pt")["pixel_values"][0], sample["txt"]


def _peer_loader(index: ShardIndex) -> float:
    import torch
    import webdataset as wds

    dataset = wds.WebDataset(paths_of(index), shardshuffle=False).decode("pil").map(_Preprocess())
    loader = torch.utils.data.DataLoader(dataset, batch_size=_ROWS, num_workers=2)
    batches = iter(loader)
    next(batches)
    start, count = time.perf_counter(), 0
    for pixels, _ in batches:
        count += len(pixels)
    return count / (time.perf_counter() - start)
