"""Restoring a checkpoint on one of 2, 16, 128, 1,024 ranks under ZeRO-2 and ZeRO-3: the same bytes in more files.

A rank hashes its share of the files, reads every weight and its own slices of Adam's moments, as at the start of a run.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.dev.bench.scale.cost import Cost, cost_of, in_child
from trainer.checkpoint.format import Fragment, commit, fault_of, take_rank_shard
from trainer.checkpoint.reader import CheckpointReader
from trainer.distributed.context import DistributedContext

NUM_ROUNDS = 3
"""The cheapest counts: other processes of the machine make the others dearer."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def shapes_of(num_layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama-shaped language model: nine tensors a layer."""
    inner, vocabulary = width * 11 // 4, 8 * width
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocabulary, width), "norm.weight": (width,)}
    for layer in range(num_layers):
        stem = f"language.model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{side}_proj.weight": (width, width) for side in "qkvo"}
        shapes |= {f"{stem}.mlp.{side}_proj.weight": (inner, width) for side in ("gate", "up")}
        shapes |= {f"{stem}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{stem}.{side}_layernorm.weight": (width,) for side in ("input", "post_attention")}
    return shapes


def measure(folder: Path, zero: int, num_ranks: int, shapes: dict[str, tuple[int, ...]]) -> Cost:
    """Write a checkpoint as `num_ranks` ranks do, restore it as one in their middle does, and remove it."""
    directory = in_child(lambda: write(folder, zero, num_ranks, shapes))
    try:
        cost: Cost = in_child(lambda: restore(directory, zero, num_ranks, shapes))
        return cost
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(folder: Path, zero: int, num_ranks: int, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A checkpoint of random weights."""
    pool = torch.rand(max(math.prod(shape) for shape in shapes.values()))
    files: dict[str, Any] = {}
    for rank in range(num_ranks):
        fragments = []
        for name, start, numel in slices(zero, rank, num_ranks, shapes):
            values = pool[:numel]
            fragments.append(Fragment(name, shapes[name], start, values, dict.fromkeys(MOMENTS, values)))
        files |= take_rank_shard(fragments, [], DistributedContext(rank, num_ranks), {}).write(folder / "writing")
    commit(folder / "writing", folder / "step_000001", {"consumed": {"steps": 1}}, files)
    return folder / "step_000001"


def slices(zero: int, rank: int, num_ranks: int, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, int, int]]:
    """(parameter, first element, elements) of what a rank holds."""
    share, place = -(-sum(math.prod(shape) for shape in shapes.values()) // num_ranks), 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        each = -(-numel // num_ranks)
        low, high = (
            (rank * each, (rank + 1) * each) if zero == 3 else (rank * share - place, (rank + 1) * share - place)
        )
        low, high = max(0, low), min(numel, high)
        if low < high:
            yield name, low, high - low
        place += numel


def restore(directory: Path, zero: int, num_ranks: int, shapes: dict[str, tuple[int, ...]]) -> Cost:
    """The cost of restoring on the rank in the middle."""
    rank = num_ranks // 2
    weights: list[tuple[str, int, Tensor]] = [(name, 0, torch.zeros(math.prod(each))) for name, each in shapes.items()]
    moments = [(name, start, torch.zeros(numel)) for name, start, numel in slices(zero, rank, num_ranks, shapes)]

    def work() -> None:
        assert fault_of(directory, (rank, num_ranks)) is None
        reader = CheckpointReader.open(directory, verify=False)
        reader.fill("weight", weights)
        for kind in MOMENTS:
            reader.fill(kind, moments)

    work()  # the page cache is warm for all alike, and lazy imports are done
    return min((cost_of(work) for _ in range(NUM_ROUNDS)), key=lambda cost: cost.cpu_s)
