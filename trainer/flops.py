"""FLOPs that a step needs, part by part, from shapes alone; and the share of a device's peak that they make.

A multiplication and an addition are two. Counted are matrix products and attention over the pairs that the causal mask
leaves; left out are norms, activations, rotary embeddings, softmax, embedding rows, dropout, the optimizer. Needed is
what any program must compute: activations computed again in the backward, padding, vision layers after the feature
layer, and, where nothing is learnt, logits and all of the last decoder layer but its keys and values are not counted.
Heads for further tokens are last layers, each with the language model's head; then its own last layer is needed whole.

    forward            2 per weight and row
    to activations     as much again, where anything that learns lies below
    to weights         as much again, where the weights learn; a LoRA pair of rank r: 2 r (inputs + outputs) each time

With Vicuna-7B, CLIP ViT-L/14-336, 726 tokens of which 100 are learnt: 19.7 TFLOP a sample when the projector learns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from data_pipeline.batch import Batch
from data_pipeline.sample import Row
from models.spec import IGNORE_INDEX
from trainer.config import Frozen, Full, Lora, TuningPlan
from trainer.shapes import LanguageShape, Linear, ModelShape, ProjectorShape, VisionShape

PEAKS: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 FLOP/s by words of the device's name, the first that fit. From NVIDIA's data sheets; where they print
the figure with sparsity, half of it. GeForce: with fp32 accumulation (Ada and Ampere GA102 white papers)."""


@dataclass(frozen=True)
class Counts:
    """What a number of rows holds, padding left out."""

    tokens: float
    targets: float
    tiles: float
    causal_pairs: float
    """Pairs (position, position at or before it) within samples: n (n + 1) / 2 for a sample of n tokens."""
    target_pairs: float
    """Those whose first position carries a target."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @classmethod
    def of_sample(cls, tokens: float, targets: float, tiles: float) -> Counts:
        """One sample alone, whose targets are its last positions."""
        pairs = tokens * (tokens + 1) / 2
        others = tokens - targets
        return cls(tokens, targets, tiles, pairs, pairs - others * (others + 1) / 2)

    def times(self, count: float) -> Counts:
        """So many of it."""
        return Counts(*(count * getattr(self, field.name) for field in fields(self)))


def count(batches: Sequence[Batch]) -> Counts:
    """What micro-batches hold. Positions start at 0 in every sample, so their sum tells the pairs."""
    total = Counts(0, 0, 0, 0, 0)
    for batch in batches:
        pairs_BL = (batch.position_ids_BL + 1) * (batch.segment_ids_BL > 0)
        target_pairs = int(pairs_BL[batch.targets_BL != IGNORE_INDEX].sum())
        tiles = batch.tiles_TSSC.shape[0]
        total += Counts(batch.num_tokens, batch.num_targets, tiles, int(pairs_BL.sum()), target_pairs)
    return total


def count_rows(rows: Sequence[Row]) -> Counts:
    """What rows hold, before they are collated; nothing is read from a device."""
    total = Counts(0, 0, 0, 0, 0)
    for sample in (sample for row in rows for sample in row):
        # A target at place i of the labels is predicted at i - 1, which sees i positions.
        places = np.flatnonzero(sample.labels[1:] != IGNORE_INDEX) + 1
        length = sample.num_tokens
        total += Counts(length, len(places), len(sample.tiles), length * (length + 1) // 2, int(places.sum()))
    return total


@dataclass(frozen=True)
class PartFlops:
    """FLOPs of one part, by what they are for."""

    forward: float = 0.0
    to_activations: float = 0.0
    to_weights: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.to_activations + self.to_weights

    def __add__(self, other: PartFlops) -> PartFlops:
        return PartFlops(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def needed_flops(shape: ModelShape, plan: TuningPlan, counts: Counts) -> dict[str, PartFlops]:
    """What a forward and backward over `counts` need, by part; with heads for further tokens where there are any."""
    vision_learns = not isinstance(plan.vision, Frozen)
    below = vision_learns or not isinstance(plan.projector, Frozen)
    parts = {
        "vision": vision_flops(shape.vision, counts.tiles, vision_learns),
        "projector": _projector(
            shape.projector,
            counts.tiles * shape.features_per_tile,
            isinstance(plan.projector, Full),
            vision_learns,
        ),
        "language": _language(shape.language, counts, plan.language, below, has_heads=shape.future is not None),
    }
    if shape.future is not None:
        below = below or not isinstance(plan.language, Frozen)
        learns = isinstance(plan.language, Full)
        parts["future"] = _future(shape.future, counts, plan.future, below, head_learns=learns)
    return parts


def vision_flops(shape: VisionShape, tiles: float, learns: bool) -> PartFlops:
    """Attention is not causal; its backward costs twice its forward. Pixels need no gradient."""
    patches = 2 * tiles * shape.num_patches * shape.patch_inputs * shape.width
    linear = 2 * tiles * shape.num_tokens * shape.layer_weights * shape.num_layers
    attention = 4 * tiles * shape.num_tokens**2 * shape.width * shape.num_layers
    if not learns:
        return PartFlops(patches + linear + attention)
    return PartFlops(patches + linear + attention, linear + 2 * attention, patches + linear)


def _projector(shape: ProjectorShape, features: float, learns: bool, vision_learns: bool) -> PartFlops:
    """The first matrix's input needs a gradient only where the vision encoder learns."""
    forward = 2 * features * shape.weights
    first = 2 * features * shape.linears[0].weights * shape.linears[0].per_token
    if vision_learns:
        return PartFlops(forward, forward, forward if learns else 0.0)
    return PartFlops(forward, forward - first, forward) if learns else PartFlops(forward)


def _language(
    shape: LanguageShape, counts: Counts, tuning: Frozen | Full | Lora, below: bool, *, has_heads: bool
) -> PartFlops:
    """The last layer's keys and values are needed everywhere, the rest of it where something is predicted."""
    num_last = 0 if has_heads else 1
    num_whole = shape.num_layers - num_last
    linear = 2 * sum(_rows(each, counts, num_whole, num_last) * each.weights for each in shape.layer_linears)
    attention = 4 * shape.query_width * (counts.causal_pairs * num_whole + counts.target_pairs * num_last)
    head = 2 * counts.targets * shape.width * shape.vocabulary
    forward = linear + attention + head
    if isinstance(tuning, Frozen):
        return PartFlops(forward, linear + 2 * attention + head if below else 0.0)
    # Without anything to learn below, layer 0 needs a gradient of q, k and v but none of its input: not taken off here.
    backward = PartFlops(forward, linear + 2 * attention + head)
    if isinstance(tuning, Full):
        return backward + PartFlops(to_weights=linear + head)
    linears = adapted(shape, tuning)
    pairs = sum(_rows(each, counts, num_whole, num_last) * (each.inputs + each.outputs) for each in linears)
    adapters = 2 * tuning.rank * pairs
    return backward + PartFlops(adapters, adapters, adapters)


def _future(
    shape: LanguageShape, counts: Counts, tuning: Frozen | Full, below: bool, *, head_learns: bool
) -> PartFlops:
    """Every layer is a last one; the head over the vocabulary, which is the language model's, is computed for each."""
    linear = 2 * sum(_rows(each, counts, 0, shape.num_layers) * each.weights for each in shape.layer_linears)
    attention = 4 * shape.query_width * counts.target_pairs * shape.num_layers
    head = 2 * counts.targets * shape.width * shape.vocabulary * shape.num_layers
    learns = isinstance(tuning, Full)
    return PartFlops(
        linear + attention + head,
        linear + 2 * attention + head if below or learns else 0.0,
        (linear if learns else 0.0) + (head if head_learns else 0.0),
    )


def _rows(linear: Linear, counts: Counts, num_whole: int, num_last: int) -> float:
    """Rows that a linear sees in all layers together: of a last one, what becomes keys and values is needed whole."""
    everywhere = linear.name in ("k_proj", "v_proj", "join")
    return counts.tokens * num_whole + (counts.tokens if everywhere else counts.targets) * num_last


def adapted(shape: LanguageShape, tuning: Lora) -> list[Linear]:
    """The linears of one layer that get a LoRA pair."""
    everything = tuning.targets == "all_linear"
    return [linear for linear in shape.layer_linears if everything or linear.name in tuning.targets]


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name (`torch.cuda.get_device_name`); None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


def utilisation(
    parts: dict[str, PartFlops], seconds: float, *, peak: float | None, num_devices: int
) -> dict[str, float]:
    """Share of the peak that the needed FLOPs of `seconds` make (MFU): in all, and each part's piece of it.

    Empty where there is no peak to compare with (a CPU, an unknown device): no share is better than a wrong one.
    """
    if peak is None or seconds <= 0:
        return {}
    possible = seconds * peak * num_devices
    shares = {f"mfu/{part}": flops.total / possible for part, flops in parts.items()}
    return {"mfu": sum(shares.values()), **shares}
