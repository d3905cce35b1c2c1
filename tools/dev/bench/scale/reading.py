"""Reading and drawing: files opened a read for so many slots, the time to a first draw, and draws a second."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.build import num_open_shards
from data_pipeline.index import ShardIndex
from data_pipeline.index_build import scan_shard, write_index
from data_pipeline.mixture import Concatenation
from data_pipeline.order import Order
from data_pipeline.sample_order import OrderIdentity, SampleOrder
from tools.dev.bench.scale.cost import Cost, cost_of

WINDOW = 4096
"""The default of `data.shuffle_window`."""

SLOTS_A_RANK = 4


@dataclass
class Reads:
    """What a rank's reads have opened."""

    num_reads: int
    opens: int
    handles: int
    """Tars that are open at the end."""


def reads_of(folder: Path, num_slots: int, num_draws: int) -> Reads:
    """Each of a rank's slots draws so many samples, a draw of each slot in turn, from as many tars as slots.

    Called in a child, since the hook that counts opens stays.
    """
    index = write_set(folder, num_slots, num_draws)
    index.read_at_once(num_open_shards(index, num_slots, WINDOW))
    order = Order(index.shard_sizes, 0, num_slots, WINDOW)

    def read_all() -> None:
        for n in range(num_draws):
            for slot in range(num_slots):
                index.read(order.sample(slot, n))

    cost = cost_of(read_all)
    return Reads(num_slots * num_draws, cost.opens, len(index.tars.files))


def write_set(folder: Path, num_shards: int, num_samples: int) -> ShardIndex:
    """A set of equal tars, one file under many names."""
    from webdataset import TarWriter

    first = folder / "s00000.tar"
    with first.open("wb") as stream, TarWriter(stream, encoder=False, mtime=0) as writer:
        for number in range(num_samples):
            writer.write({"__key__": f"{number:06d}", "txt": b"a caption"})
    table = scan_shard(first)
    names = [f"s{number:05d}.tar" for number in range(num_shards)]
    for name in names[1:]:
        os.link(first, folder / name)
    write_index(folder, [replace(table, name=name) for name in names])
    return ShardIndex.open(folder)


def draws_of(folder: Path, num_ranks: int, num_draws: int) -> tuple[Cost, float]:
    """What a rank of so many pays until its first draw is known, and how many draws it then resolves a second of CPU.

    Args:
        folder: of a set; no tar of it is read.
    """
    found: list[Any] = []

    def open_and_draw() -> None:
        index = ShardIndex.open(folder)
        num_slots = SLOTS_A_RANK * num_ranks
        plan = Concatenation([index.shard_sizes], 0, num_slots, WINDOW)
        order = SampleOrder([index], plan, OrderIdentity(index.fingerprint, 0, num_slots))
        order.resolve(num_slots // 2, 0)
        found.append(order)

    first = cost_of(open_and_draw)
    (order,) = found
    slots = range(SLOTS_A_RANK * (num_ranks // 2), SLOTS_A_RANK * (num_ranks // 2 + 1))

    def draw() -> None:
        for n in range(num_draws // SLOTS_A_RANK):
            for slot in slots:
                order.resolve(slot, n)

    cost = cost_of(draw)
    return first, num_draws / cost.cpu_s
