"""Memory that one GPU needs for a stage, from shapes alone: what lies there all the time, and the peak of a step.

Owns the arithmetic. Does not own the shapes (`trainer.shapes`) or the parameter counts (`tools.preflight.geometry`).
What autograd keeps of a decoder layer is counted tensor by tensor, as `models.decoder` and `models.lean` compute it:

    both norms' inputs; queries, keys, values, what attention gives and its log-sums; gate and up
    where weights learn: every linear's input; where adapters do: an input for each of them, and its rank's output
    with dropout on adapters: a mask of one byte an element besides

Not known before a run: the allocator's fragmentation and the libraries' own memory; `RESERVE_BYTES` stands for them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.preflight.geometry import PartCount
from tools.preflight.pair_memory import FP32, pair_activations
from trainer.config import Frozen, Full, ImageText, Lora, MultiToken, StageConfig
from trainer.flops import Counts, adapted
from trainer.shapes import LanguageShape, ModelShape, VisionShape

RESERVE_BYTES = 2e9
"""CUDA's context, cuBLAS's and NCCL's workspaces, fragmentation: an assumption, not a measurement."""

NF4_BYTES, INT8_BYTES = 4.127 / 8, 1.0
"""A quantized weight: 4 bits, and for 64 of them 8 bits of scale with its own scale (Dettmers et al. 2023)."""

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
MASK_BYTES = 1
SHARES_INPUT = ("k_proj", "v_proj", "up_proj")
"""Linears whose input is that of the one before."""

LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU, by what they are for."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All of them at the peak of a step."""
        return sum(self.parts.values())


def estimate(
    shape: ModelShape,
    counts: dict[str, PartCount],
    stage: StageConfig,
    micro_batch: Counts,
    *,
    load: str,
    num_gpus: int,
    settings: dict[str, Any],
    num_recomputed: int,
) -> Estimate:
    """Bytes of a step whose micro-batch is `micro_batch`; `settings` is the stage's ds_config."""
    zero = int(settings["zero_optimization"]["stage"])
    element = FP32 if stage.engine.precision == "fp32" else 2
    trained = sum(part.trained for part in counts.values())
    parts = states(counts, trained, element, load=load, zero=zero, num_gpus=num_gpus, settings=settings)
    if element < FP32:
        parts["16-bit copies of what learns"] = float(element * trained)
    if isinstance(stage.objective, ImageText):
        assert shape.pairs is not None, "a recipe with another projector is refused"
        parts["activations"] = pair_activations(shape.pairs, stage.objective.losses, micro_batch, element)
    else:
        parts["activations"] = activations(shape, stage, micro_batch, element, num_recomputed)
        parts["logits"] = 3.0 * FP32 * min(micro_batch.targets * shape.language.vocabulary, LOGITS_AT_ONCE)
    parts["workspace"] = workspace(shape, micro_batch, element) + RESERVE_BYTES
    return Estimate(parts)


def states(
    counts: dict[str, PartCount],
    trained: int,
    element: int,
    *,
    load: str,
    zero: int,
    num_gpus: int,
    settings: dict[str, Any],
) -> dict[str, float]:
    """Weights, gradients, moments and buckets. What learns is fp32; ZeRO 1 and 2 hold a further fp32 slice of it."""
    shared = num_gpus if zero == 3 else 1
    frozen = float(sum(part.frozen * element for part in counts.values()))
    if load != "full":
        frozen -= counts["language"].quantizable * (element - (NF4_BYTES if load == "nf4" else INT8_BYTES))
    slices = num_gpus if zero else 1
    on_gpu = 0.0 if "offload_optimizer" in settings["zero_optimization"] else 1.0
    zero_settings = settings["zero_optimization"]
    bucket = float(zero_settings.get("reduce_bucket_size", 5e8)) * FP32 if zero else 0.0
    return {
        "frozen weights": frozen / shared,
        "trained weights": trained * FP32 / shared + (trained * FP32 / slices * on_gpu if zero in (1, 2) else 0.0),
        "gradients": trained * FP32 / (num_gpus if zero >= 2 else 1) * (1.0 if zero < 2 else on_gpu or 1.0),
        "Adam's moments": 2 * trained * FP32 / slices * on_gpu,
        "ZeRO's buckets": min(bucket, 4.0 * FP32 * trained) * (2 if zero_settings.get("overlap_comm") else 1),
    }


def activations(shape: ModelShape, stage: StageConfig, batch: Counts, element: int, num_recomputed: int = 0) -> float:
    """Bytes that autograd keeps from the forward to the backward; one recomputed layer is whole while it is redone."""
    plan = stage.tune
    language = shape.language
    below = not (isinstance(plan.vision, Frozen) and isinstance(plan.projector, Frozen))
    features = batch.tiles * shape.features_per_tile
    kept = 0.0
    if not isinstance(plan.vision, Frozen):
        kept += vision_bytes(shape.vision, batch.tiles, element)
    if not isinstance(plan.projector, Frozen) or below:
        widths = [linear.inputs * linear.per_token for linear in shape.projector.linears]
        kept += features * element * (sum(widths) + sum(widths[1:]))
    if not below and isinstance(plan.language, Frozen):
        return kept
    heads = shape.future if isinstance(stage.objective, MultiToken) else None
    early = layer_bytes(language, plan.language, batch.tokens, batch.tokens, element)
    last = early if heads else layer_bytes(language, plan.language, batch.tokens, batch.targets, element)
    layers = [early] * (language.num_layers - 1) + [last]
    recomputed = min(num_recomputed, len(layers))
    inputs = batch.tokens * language.width * element
    whole = sum(sorted(layers)[: len(layers) - recomputed]) + recomputed * inputs + (early if recomputed else 0.0)
    ends = batch.targets * (2 * language.width * element + FP32)  # the last norm's input, and the loss's gradient
    for _ in range(heads.num_layers if heads else 0):  # the norm before each goes over every position
        assert heads is not None
        ends += layer_bytes(heads, plan.future, batch.tokens, batch.tokens, element)
        ends += batch.tokens * language.width * element + batch.targets * (language.width * element + FP32)
    return kept + whole + ends


def layer_bytes(shape: LanguageShape, tuning: Frozen | Full | Lora, tokens: float, rows: float, element: int) -> float:
    """Of one decoder layer that computes keys and values at `tokens` positions and the rest at `rows`."""
    attention = tokens * (2 * shape.query_width + 2 * shape.key_width) * element + tokens * shape.num_heads * FP32
    stream = FP32 if isinstance(tuning, Full) else element  # embeddings that learn are fp32, and so what is added up
    kept = attention + (tokens + rows) * (shape.width * stream + FP32) + rows * 2 * shape.inner * element
    if isinstance(tuning, Frozen):
        return kept
    for linear in shape.layer_linears if isinstance(tuning, Full) else adapted(shape, tuning):
        here = tokens if linear.name in ("k_proj", "v_proj") else rows
        shared = element == FP32 and linear.name in SHARES_INPUT  # autocast makes each linear a copy of its own
        if isinstance(tuning, Lora):
            kept += here * (tuning.rank * element + (MASK_BYTES * linear.inputs if tuning.dropout else 0))
            shared = shared and not tuning.dropout
        kept += 0 if shared else here * linear.inputs * element
    return kept


def vision_bytes(shape: VisionShape, tiles: float, element: int) -> float:
    """Of an encoder that learns: a layer's norms, attention, linears' inputs and activation."""
    per_token = (8 * shape.width + 2 * shape.inner) * element + 4 * FP32
    return tiles * shape.num_tokens * per_token * shape.num_layers


def workspace(shape: ModelShape, batch: Counts, element: int) -> float:
    """The largest passing need: a decoder layer's gradients, or an encoder layer's activations and pixels."""
    language, vision = shape.language, shape.vision
    decoder = batch.tokens * (3 * language.inner + 4 * language.width) * element
    pixels = batch.tiles * vision.num_patches * vision.patch_inputs * (FP32 + element)
    encoder = batch.tiles * vision.num_tokens * (2 * vision.inner + 6 * vision.width) * element + pixels
    return max(decoder, encoder)


def read_settings(zero: str) -> dict[str, Any]:
    """The ds_config that `zero` names."""
    settings: dict[str, Any] = json.loads((CONFIGS / f"{zero}.json").read_text(encoding="utf-8"))
    return settings
