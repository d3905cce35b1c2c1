"""FLOPs of a Q-Former under BLIP-2's three losses, from shapes alone, counted as `trainer.flops.language` counts.

    see       queries, and the image                ITC; ITM, without a backward, to choose wrong partners
    read      the text alone                          the same
    match     queries, image and text together      ITM: the pair, a wrong image, a wrong text
    caption   queries, image and text together      ITG, and the vocabulary at each word

Everything but the encoder is trained. Not counted are similarities, whose cost depends on the global batch: with 512
pairs below 1 % of the layers. ITC uses only a text's first position, and ITM none after the last layer; that saving is
not subtracted here.
"""

from __future__ import annotations

from collections.abc import Collection

from models.shapes import Counts, PairShape, PartFlops, VisionShape
from trainer.flops.language import vision_flops

NUM_MATCHES = 3
"""Comparisons of image and text for each pair in ITM."""


def pair_flops(
    vision: VisionShape, shape: PairShape, losses: Collection[str], counts: Counts, *, vision_learns: bool
) -> dict[str, PartFlops]:
    """FLOPs of a forward and backward over `counts` pairs; a pair's tokens are its queries and its text."""
    pairs, words = counts.tiles, counts.tokens - counts.tiles * shape.num_queries
    together = 2 * counts.causal_pairs - counts.tokens  # n (n + 1) / 2 a pair -> n^2
    queries_squared = pairs * shape.num_queries**2
    words_squared = together - 2 * shape.num_queries * words - queries_squared
    both = _seeing(shape, pairs) + _reading(shape, words) + _attending(shape, together)
    total = PartFlops()
    if {"itc", "itm"} & set(losses):
        alone = _seeing(shape, pairs) + _attending(shape, queries_squared)
        alone += _reading(shape, words) + _attending(shape, words_squared)
        alone += _learnt(2 * pairs * (shape.num_queries + 1) * shape.width * shape.joint_width)
        total += alone if "itc" in losses else PartFlops(alone.forward)
    if "itm" in losses:
        total += _times(both, NUM_MATCHES)
    if "itg" in losses:
        vocabulary = 2 * (words - pairs) * shape.width * (shape.width + shape.vocabulary)
        total += both + _learnt(vocabulary)
    return {"vision": vision_flops(vision, counts, vision_learns), "projector": total}


def _seeing(shape: PairShape, pairs: float) -> PartFlops:
    """The queries' matrices and cross-attention to the image in one pass, without their self-attention."""
    queries, features = pairs * shape.num_queries, pairs * shape.num_features
    linear = 2 * queries * (4 * shape.width**2 + 2 * shape.width * shape.inner) * shape.num_layers
    looks = 2 * (2 * queries * shape.width**2 + 2 * features * shape.vision_width * shape.width) * shape.num_cross
    attention = 4 * queries * shape.num_features * shape.width * shape.num_cross
    return _learnt(linear + looks) + PartFlops(attention, 2 * attention)


def _reading(shape: PairShape, words: float) -> PartFlops:
    """The text's matrices in one pass."""
    return _learnt(2 * words * (4 * shape.width**2 + 2 * shape.width * shape.inner) * shape.num_layers)


def _attending(shape: PairShape, squares: float) -> PartFlops:
    """Attention over `pairs` pairs of positions."""
    attention = 4 * squares * shape.width * shape.num_layers
    return PartFlops(attention, 2 * attention)


def _learnt(forward: float) -> PartFlops:
    return PartFlops(forward, forward, forward)


def _times(flops: PartFlops, number: int) -> PartFlops:
    return PartFlops(*(number * value for value in (flops.forward, flops.to_activations, flops.to_weights)))
