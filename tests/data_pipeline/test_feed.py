"""Batches fed to a device are the very batches that `collate` makes, and the next one is begun early."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_pipeline.batch import Batch, collate
from data_pipeline.feed import feed
from data_pipeline.sample import Row
from tests.support.shards import text_spec, write_set
from tests.support.streams import TOKENIZER, config, open_rank

TEXT = text_spec(TOKENIZER)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def parts(folder: Path) -> list[list[Row]]:
    write_set(folder, [30])
    stream = open_rank(config(folder))
    found: list[list[Row]] = []
    while not stream.exhausted:
        rows = stream.next_rows()
        found += [rows[:4], rows[4:]]
    return found


def assert_equal(one: Batch, other: Batch) -> None:
    for first, second in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(first.cpu(), second.cpu())
    assert (one.keys, one.num_targets, one.num_tokens) == (other.keys, other.num_targets, other.num_tokens)


@pytest.mark.parametrize("device", DEVICES)
def test_feeding_changes_nothing(tmp_path: Path, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    wanted = parts(tmp_path / "set")
    fed = list(feed(wanted, TEXT, torch.device(device)))
    assert len(fed) == len(wanted) == 8
    for batch, rows in zip(fed, wanted, strict=True):
        assert batch.device.type == device
        assert_equal(batch, collate(rows, TEXT))


@pytest.mark.parametrize("device", DEVICES)
def test_at_most_one_batch_is_ahead(tmp_path: Path, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    num_taken = 0

    def counted() -> Iterator[list[Row]]:
        nonlocal num_taken
        for part in wanted:
            num_taken += 1
            yield part

    wanted = parts(tmp_path / "set")
    for place, _ in enumerate(feed(counted(), TEXT, torch.device(device)), start=1):
        ahead = 1 if device == "cuda" else 0
        assert num_taken == min(place + ahead, len(wanted))


def test_nothing_to_feed() -> None:
    assert list(feed([], TEXT, torch.device("cpu"))) == []
