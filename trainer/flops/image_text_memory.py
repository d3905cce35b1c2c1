"""Bytes that BLIP-2's three losses keep of a Q-Former from the forward to the backward, from shapes alone.

Kept of each layer and pass, W the Q-Former's width:

    self-attention    its input, queries, keys, values, the output by head and joined, and the norm's input
    cross-attention   the same, with keys and values of the image
    feed-forward      its input, the inner states before and after the activation, its output

Norms are computed in fp32; a matrix's input is kept as its own 16-bit copy where products are 16-bit.
"""

from __future__ import annotations

from collections.abc import Collection

from models.shapes import Counts, PairShape
from trainer.flops.image_text import NUM_MATCHES
from trainer.flops.language_memory import FP32


def pair_activations(shape: PairShape, losses: Collection[str], counts: Counts, element: int) -> float:
    """Bytes of a rank's pairs; a pair's tokens are its queries and its text."""
    pairs = counts.tiles
    queries, words = pairs * shape.num_queries, counts.tokens - pairs * shape.num_queries
    images = pairs * shape.num_features
    kept = 0.0
    if "itc" in losses:
        kept += _pass(shape, queries, 0.0, images, element) + _pass(shape, 0.0, words, 0.0, element)
    if "itm" in losses:
        kept += NUM_MATCHES * _pass(shape, queries, words, images, element)
        kept += NUM_MATCHES * images * shape.vision_width * FP32  # of all ranks', copied pair by pair
    if "itg" in losses:
        kept += _pass(shape, queries, words, images, element)
        kept += (words - pairs) * (2 * shape.width * (element + FP32) + shape.vocabulary * (element + FP32))
    return kept


def _pass(shape: PairShape, queries: float, words: float, images: float, element: int) -> float:
    """All layers over so many queries and words, which look at so many features of images."""
    width, both = shape.width, queries + words
    shares_input = element == FP32  # autocast makes each matrix a copy of its own
    attention = both * width * ((1 if shares_input else 3) * element + 5 * element + FP32)
    look = queries * width * (4 * element + FP32) + images * 2 * width * element
    look += 0 if shares_input else images * 2 * shape.vision_width * element
    forward = both * (width * (element + FP32) + 2 * shape.inner * element)
    once = images * shape.vision_width * (2 if shares_input else 1) * FP32
    return (attention + forward) * shape.num_layers + look * shape.num_cross + once
