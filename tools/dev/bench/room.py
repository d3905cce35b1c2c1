"""Our rows per micro-batch on a device, and the number of recomputed layers, by preflight's estimate.

Owns the choice. Does not own the arithmetic (`tools.preflight.memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.sample import Encoded
from tools.dev.bench.pair import Shape, Tuned, model_of, needed, packed_rows, plan
from tools.preflight.geometry import PartCount
from tools.preflight.memory import RESERVE_BYTES, estimate, read_settings
from trainer.config.schema import StageConfig
from trainer.flops.counts import count_rows
from trainer.flops.shapes import model_shape

ROW_TOKENS = 4096
MOST_ROWS = 8
USED_SHARE = 0.85
"""Share of the device's memory; the rest is for the allocator and the other way's weights."""


@dataclass(frozen=True)
class Cell:
    """One comparison: a model's shape, the tuned parts, the samples and the device."""

    shape: Shape
    tuned: Tuned
    rank: int
    samples: Sequence[Encoded]
    device: torch.device
    compiles: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, image tokens included."""
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def needed_flops(self) -> float:
        """FLOPs that any program must compute for a step over all samples."""
        return needed(self.shape, plan(self.tuned, self.rank), count_rows([tuple(self.samples)]))


def choices(cell: Cell, model: Any) -> list[tuple[int, int, float]]:
    """(rows per micro-batch, recomputed layers, bytes by preflight without its reserve), the best first.

    Most rows first, nothing recomputed; then fewer rows; layers are recomputed only where one row alone is too much.
    """
    has = float("inf")
    if cell.device.type == "cuda":
        has = USED_SHARE * torch.cuda.get_device_properties(cell.device).total_memory
    layers = int(cell.shape.language["num_hidden_layers"])
    pairs = [(rows, 0) for rows in range(MOST_ROWS, 0, -1)] + [(1, number) for number in range(1, layers + 1)]
    found = [(rows, number, expected_bytes(cell, model, rows, number)) for rows, number in pairs]
    return [choice for choice in found if choice[2] <= has] or found[-1:]


def expected_bytes(cell: Cell, model: Any, rows: int, num_recomputed: int) -> float:
    """Preflight's bytes for the most expensive micro-batch of this many rows."""
    tuning = plan(cell.tuned, cell.rank)
    stage = StageConfig.model_validate(
        {
            "tune": tuning,
            "data": {"sources": [{"path": ""}], "template": {"kind": "plain"}, "max_length": ROW_TOKENS},
            "duration": {"unit": "steps", "count": 1},
            "batch": {"global_rows": 1, "micro_rows": 1},
            "engine": {"zero": "zero0"},
        }
    )
    shape = model_shape(model_of(), cell.shape.find)
    counts = {}
    for part in ("vision", "projector", "language"):
        total = sum(parameter.numel() for parameter in getattr(model, part).parameters())
        learns = part == "projector" or (part == "language" and cell.tuned == "full")
        counts[part] = PartCount(0 if learns else total, total if learns else 0)
    if cell.tuned == "lora":
        linears = sum(linear.inputs + linear.outputs for linear in shape.language.layer_linears)
        adapters = cell.rank * linears * shape.language.num_layers
        counts["language"] = PartCount(counts["language"].frozen, adapters)
    parts = packed_rows(cell.samples, ROW_TOKENS, rows)
    dearest = max((count_rows(part) for part in parts), key=lambda found: found.tokens)
    found = estimate(
        shape, counts, stage, dearest, load="full", num_gpus=1, settings=read_settings("zero0"),
        num_recomputed=num_recomputed,
    )  # fmt: skip
    return found.total - RESERVE_BYTES
