"""Memory that one GPU needs for a stage, from shapes alone: the constant part, and the peak of a step.

Owns the arithmetic of the constant part. Does not own the shapes (`trainer.flops.shapes`), the parameter
counts (`tools.preflight.geometry`), or the activations that autograd keeps, which the stage's objective computes
(`trainer.flops.language_memory`, `trainer.flops.image_text_memory`).

Not known before a run: the allocator's fragmentation and the libraries' own memory; `RESERVE_BYTES` is an assumption
for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.common.documents import read_json
from models.shapes import Counts, ModelShape
from tools.preflight.geometry import PartCount
from trainer.config.schema import DS_CONFIGS, StageConfig
from trainer.engine.deepspeed_config import zero_stage
from trainer.engine.masters import has_masters
from trainer.flops.language_memory import FP32

RESERVE_BYTES = 2e9
"""CUDA's context, cuBLAS's and NCCL's workspaces, fragmentation: an assumption, not a measurement."""

MAX_LIVE = 1e9
"""Elements of gathered weights that ZeRO-3 keeps at most: DeepSpeed's default, and that of ds_configs/."""

NF4_BYTES, INT8_BYTES = 4.127 / 8, 1.0
"""A quantized weight: 4 bits, and for 64 of them 8 bits of scale with its own scale (Dettmers et al. 2023)."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU, by purpose."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of all parts together at the peak of a step."""
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
    trained = sum(part.trained for part in counts.values())
    stored = storage(stage, settings, trained, num_gpus)
    element = FP32 if stage.engine.precision == "fp32" else 2
    parts = states(counts, element, stored, load=load)
    if element < FP32 and not stored.has_masters and stored.zero < 3:  # ZeRO-3's gathered weights are given up at once
        parts["16-bit copies of what learns"] = float(element * trained)
    parts |= stage.objective.activation_bytes(
        shape, stage.tune, micro_batch, element=element, num_recomputed=num_recomputed
    )
    parts["workspace"] = workspace(shape, micro_batch, element) + RESERVE_BYTES
    return Estimate(parts)


@dataclass(frozen=True)
class Storage:
    """Where a stage's ZeRO keeps what learns."""

    zero: int
    num_gpus: int
    has_masters: bool
    """Parameters are bf16, with fp32 masters apart (`trainer.engine.masters`)."""
    settings: Mapping[str, Any]
    """Of DeepSpeed, `zero_optimization`."""

    @property
    def parameter(self) -> int:
        """Bytes of a trained parameter, and of its gradient on the wire."""
        return 2 if self.has_masters else FP32

    def live_share(self, counts: dict[str, PartCount]) -> float:
        """Share of the weights that ZeRO-3 keeps gathered until their next use."""
        total = sum(part.frozen + part.trained for part in counts.values())
        return min(1.0, float(self.settings.get("stage3_max_live_parameters", MAX_LIVE)) / total)

    def offloads(self, what: str) -> bool:
        """Whether `optimizer` or `param` is in the host's memory."""
        return f"offload_{what}" in self.settings


def storage(stage: StageConfig, settings: dict[str, Any], trained: int, num_gpus: int) -> Storage:
    """That of a stage with so many trained weights on so many GPUs, under a ds_config."""
    zero = settings["zero_optimization"]
    number = zero_stage(zero, stage.batch.num_micro_batches(num_gpus), trained)
    return Storage(number, num_gpus, has_masters(stage) and number > 0, zero)


def states(counts: dict[str, PartCount], element: int, stored: Storage, *, load: str) -> dict[str, float]:
    """Weights, gradients, moments and buckets on one GPU, at the end of a step's last backward.

    ZeRO 1 to 3 keep an fp32 slice beside the parameters, whatever those are.
    """
    trained = sum(part.trained for part in counts.values())
    frozen = float(sum(part.frozen * element for part in counts.values()))
    if load != "full":
        frozen -= counts["language"].quantizable * (element - (NF4_BYTES if load == "nf4" else INT8_BYTES))
    slices = stored.num_gpus if stored.zero else 1
    shared = float(stored.num_gpus) if stored.zero == 3 else 1.0
    here = 0.0 if stored.offloads("optimizer") else 1.0
    at_rest = 0.0 if stored.offloads("param") else 1.0 / shared
    slice_bytes = trained * FP32 / slices * here
    whole = trained * FP32 if stored.zero < 2 else 0.0  # micro-batches are added up in it, in fp32
    parts = {
        "frozen weights": frozen * at_rest,
        "trained weights": trained * stored.parameter * at_rest + (slice_bytes if stored.zero else 0.0),
        "gradients": whole + (slice_bytes if stored.zero > 1 or (stored.zero == 1 and stored.has_masters) else 0.0),
        "Adam's moments": 2 * slice_bytes,
        "ZeRO's buckets": _bucket_bytes(stored, trained),
    }
    if stored.zero == 3:
        parts["gathered weights"] = stored.live_share(counts) * (frozen + trained * stored.parameter)
    return parts


def _bucket_bytes(stored: Storage, trained: int) -> float:
    """Buffers that gradients are copied into to be reduced; ZeRO-1 adds up in fp32."""
    if not stored.zero:
        return 0.0
    elements = min(float(stored.settings.get("reduce_bucket_size", 5e8)), float(trained))
    size = FP32 if stored.zero == 1 else stored.parameter
    return elements * size * (2 if stored.settings.get("overlap_comm") else 1)


def workspace(shape: ModelShape, batch: Counts, element: int) -> float:
    """The largest temporary need: a decoder layer's gradients, or an encoder layer's activations and pixels."""
    language, vision = shape.language, shape.vision
    decoder = batch.tokens * (3 * language.inner + 4 * language.width) * element
    pixels = batch.tiles * vision.num_patches * vision.patch_inputs * (FP32 + element)
    encoder = batch.tiles * vision.num_tokens * (2 * vision.inner + 6 * vision.width) * element + pixels
    return max(decoder, encoder)


def read_settings(zero: str) -> dict[str, Any]:
    """The ds_config that `zero` names."""
    return read_json(DS_CONFIGS, f"{zero}.json")
