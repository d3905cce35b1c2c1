"""Bytes that BLIP-2's three losses keep of a Q-Former from the forward to the backward, from shapes alone.

Of each layer and pass are kept, W the Q-Former's width: the states that attention starts from, queries, keys, values,
what attention gives, that again side by side, and a norm's input; of a feed-forward its inner states before and behind
the activation and both its ends; of a look at a picture the same as of attention, with the picture's keys and values.
Norms are computed in fp32; what feeds a matrix is kept as that matrix's own 16-bit copy where products are 16-bit.
"""

from __future__ import annotations

from collections.abc import Collection

from trainer.flops import Counts
from trainer.pair_flops import NUM_MATCHES
from trainer.shapes import PairShape

FP32 = 4


def pair_activations(shape: PairShape, losses: Collection[str], counts: Counts, element: int) -> float:
    """Bytes of a rank's pairs; a pair's tokens are its queries and its text."""
    pairs = counts.tiles
    queries, words = pairs * shape.num_queries, counts.tokens - pairs * shape.num_queries
    pictures = pairs * shape.num_features
    kept = 0.0
    if "itc" in losses:
        kept += _pass(shape, queries, 0.0, pictures, element) + _pass(shape, 0.0, words, 0.0, element)
    if "itm" in losses:
        kept += NUM_MATCHES * _pass(shape, queries, words, pictures, element)
        kept += NUM_MATCHES * pictures * shape.vision_width * FP32  # of the pool's, copied pair by pair
    if "itg" in losses:
        kept += _pass(shape, queries, words, pictures, element)
        kept += (words - pairs) * (2 * shape.width * (element + FP32) + shape.vocabulary * (element + FP32))
    return kept


def _pass(shape: PairShape, queries: float, words: float, pictures: float, element: int) -> float:
    """All layers over so many queries and words, which look at so many features of pictures."""
    width, both = shape.width, queries + words
    shares_input = element == FP32  # autocast makes each matrix a copy of its own
    attention = both * width * ((1 if shares_input else 3) * element + 5 * element + FP32)
    look = queries * width * (4 * element + FP32) + pictures * 2 * width * element
    look += 0 if shares_input else pictures * 2 * shape.vision_width * element
    forward = both * (width * (element + FP32) + 2 * shape.inner * element)
    once = pictures * shape.vision_width * (2 if shares_input else 1) * FP32
    return (attention + forward) * shape.num_layers + look * shape.num_cross + once
