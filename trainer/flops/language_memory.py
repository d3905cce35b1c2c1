"""Bytes that autograd keeps of a step through the language model, from shapes alone.

The tensors kept of a decoder layer are counted one by one, as in `models.decoder` and `models.memory_efficient`:

    both norms' inputs; queries, keys, values, attention's output and log-sums; gate and up
    trained weights: every linear's input; adapters: an input and the rank's output for each
    dropout on adapters: also a mask of one byte per element

`element` is the bytes of a number in the forward: 4 with fp32, else 2.
"""

from __future__ import annotations

from models.shapes import Counts, LanguageShape, ModelShape, VisionShape
from trainer.config.tuning import Frozen, Full, Lora, TuningPlan
from trainer.flops.language import adapted

FP32 = 4
MASK_BYTES = 1
SHARES_INPUT = ("k_proj", "v_proj", "up_proj")
"""Linears whose input is shared with the previous one."""


def language_activations(
    shape: ModelShape, plan: TuningPlan, batch: Counts, element: int, num_recomputed: int = 0
) -> float:
    """Bytes that autograd keeps of all parts; a recomputed layer is whole while it is recomputed.

    With heads for further tokens where the shape has any.
    """
    language, heads = shape.language, shape.mtp
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
    """Bytes of one decoder layer that computes keys and values at `tokens` positions and the rest at `rows`."""
    attention = tokens * (2 * shape.query_width + 2 * shape.key_width) * element + tokens * shape.num_heads * FP32
    stream = FP32 if isinstance(tuning, Full) else element  # trained embeddings are fp32, and so is the residual stream
    kept = attention + (tokens + rows) * (shape.width * stream + FP32) + rows * 2 * shape.inner * element
    if isinstance(tuning, Frozen):
        return kept
    for linear in shape.layer_linears if isinstance(tuning, Full) else adapted(shape, tuning):
        here = tokens if linear.name in ("k_proj", "v_proj") else rows
        # Over an fp32 stream autocast makes each linear a copy of its own.
        shared = linear.name in SHARES_INPUT and element == stream
        if isinstance(tuning, Lora):
            kept += here * (tuning.rank * element + (MASK_BYTES * linear.inputs if tuning.dropout else 0))
            shared = shared and not tuning.dropout
        kept += 0 if shared else here * linear.inputs * element
    return kept


def vision_bytes(shape: VisionShape, tiles: float, element: int) -> float:
    """Bytes of a trained encoder: a layer's norms, attention, linears' inputs and activation."""
    per_token = (8 * shape.width + shape.inner_activations * shape.inner) * element + 4 * FP32
    return tiles * shape.num_tokens * per_token * shape.num_layers
