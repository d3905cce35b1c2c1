"""Streams over small sets of samples, with the tests' own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.build import open_stream
from data_pipeline.config import ChatmlTemplate, DataConfig, SourceConfig
from data_pipeline.stream import RowStream
from tests.support.shards import IMAGE, text_spec, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def config(*sources: Path | SourceConfig, **values: Any) -> DataConfig:
    """Data of these sets, read in the main process."""
    found = tuple(each if isinstance(each, SourceConfig) else SourceConfig(path=str(each)) for each in sources)
    settled: dict[str, Any] = {"template": ChatmlTemplate(), "max_length": 256, "num_workers": 0, "shuffle_window": 4}
    return DataConfig(sources=found, **(settled | values))


def open_rank(
    data: DataConfig, rank: int = 0, world: int = 1, *, num_slots: int = 8, epochs: int | None = 1, **values: Any
) -> RowStream:
    """One rank's stream; `values` change its image size, seed or quarantine."""
    each = num_slots // world
    arguments: dict[str, Any] = {"image": IMAGE, "seed": 3, "quarantine": None} | values
    return open_stream(
        data,
        tokenizer=TOKENIZER,
        text=text_spec(TOKENIZER),
        num_slots=num_slots,
        slots=range(rank * each, (rank + 1) * each),
        epochs=epochs,
        **arguments,
    )


def keys_left(stream: RowStream) -> list[str]:
    """The keys of all rows that are left."""
    keys = list[str]()
    while not stream.exhausted:
        keys += [sample.key for row in stream.next_rows() for sample in row]
    return keys
