"""1,024 ranks, then 768, then 1,024 draw the same global batches as one rank does, restarted within an epoch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.config import PadPacking, RowPacking
from data_pipeline.fetch import Fetcher
from data_pipeline.mixture import Concatenation, Mixture, Plan
from data_pipeline.sample import BadSample, Encoded, SampleRef
from data_pipeline.sample_order import OrderIdentity, SampleOrder
from data_pipeline.stream import Limits, RowStream
from data_pipeline.stream_state import merge_states
from tools.dev.bench.scale.reading import write_set
from trainer.distributed.context import DistributedContext

NUM_ROWS = 3072
PHASES = ((1024, 2), (768, 3), (1024, 4))
"""Ranks, and the global batches that they draw before they are restarted."""


def encode(ref: SampleRef) -> Encoded | BadSample:
    """Of a length that its place gives; one in 40 cannot be used."""
    if ref.sample % 40 == 7:
        return BadSample(ref, "broken")
    ids = np.zeros(1 + ref.sample % 9, np.int32)
    return Encoded(ref, ids, ids, np.zeros((0, 1, 1, 3), np.uint8))


def open_ranks(order: SampleOrder, num_ranks: int, packing: Any, state: dict[str, Any] | None) -> list[RowStream]:
    streams = []
    for rank in range(num_ranks):
        slots = DistributedContext(rank, num_ranks).local_rows(NUM_ROWS)
        fetcher = Fetcher(encode, 0)
        stream = RowStream(order, fetcher, slots=slots, packing=packing, epochs=2, limits=Limits(bad_share=0.5))
        if state is not None:
            stream.load_state_dict(state)
        streams.append(stream)
    return streams


def batches(streams: Iterable[RowStream], num_batches: int) -> list[list[list[tuple[str, str]]]]:
    """The (shard, key) of each sample of each row of each global batch, the ranks' rows one after the other."""
    found: list[list[list[tuple[str, str]]]] = [[] for _ in range(num_batches)]
    for stream in streams:
        for batch in found:
            batch += [[(sample.shard, sample.key) for sample in row] for row in stream.next_rows()]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padded", "packed", "mixed"])
def test_any_ranks_draw_the_same_global_batches(tmp_path: Path, kind: str) -> None:
    index = write_set(tmp_path, 64, 200)
    plan: Plan = Concatenation([index.shard_sizes], 5, NUM_ROWS, 16)
    if kind == "mixed":
        plan = Mixture([index.shard_sizes, index.shard_sizes[:20]], [3, 1], 5, NUM_ROWS, 16)
    order = SampleOrder([index, index], plan, OrderIdentity("f", 5, NUM_ROWS))
    packing = RowPacking(row_tokens=12) if kind == "packed" else PadPacking()
    (alone,) = open_ranks(order, 1, packing, None)
    state: dict[str, Any] | None = None
    drawn = 0
    for num_ranks, num_batches in PHASES:
        streams = open_ranks(order, num_ranks, packing, state)
        assert batches(streams, num_batches) == batches([alone], num_batches)
        state = json.loads(json.dumps(merge_states(stream.state_dict() for stream in streams)))
        drawn = sum(stream.num_drawn for stream in streams)
    assert state is not None
    assert state["slots"] == json.loads(json.dumps(alone.state_dict()))["slots"]
    assert drawn > 1.5 * order.epoch_samples or kind == "mixed", "the second epoch has begun"
