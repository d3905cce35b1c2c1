"""Recall at k of images and texts, from a matrix of similarities: one rule for dual encoders and Q-Formers.

CLIP_benchmark's recall (https://github.com/LAION-AI/CLIP_benchmark, `zeroshot_retrieval.py`): a query counts where any
of its own candidates is among the k nearest, so an image has found its text where any of its captions is there.

I images, T texts, Q queries, C candidates; V vectors an image (a Q-Former's queries), E their width.
"""

from __future__ import annotations

from functools import reduce
from typing import Literal

import torch
from torch import Tensor

RANKS = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
METRICS = tuple(f"{direction}/recall_at_{rank}" for direction in DIRECTIONS for rank in RANKS)

Ties = Literal["against", "for", "topk"]
"""How a wrong candidate counts that is exactly as near as the nearest right one: as nearer, as farther, or as
torch.topk happens to order them, as published figures have it."""

_QUERIES_AT_ONCE = 1024


def cosines(images_IVE: Tensor, texts_TE: Tensor) -> Tensor:
    """Similarities [I, T] of unit vectors: of an image's several vectors the nearest counts, as in BLIP-2."""
    return reduce(torch.maximum, (vectors_IE @ texts_TE.T for vectors_IE in images_IVE.unbind(1)))


def hits(scores_QC: Tensor, is_pair_QC: Tensor, rank: int, *, ties: Ties = "against") -> Tensor:
    """Whether each of Q queries [Q, bool] has one of its own candidates among the `rank` nearest."""
    if ties == "topk":
        nearest_QK = scores_QC.topk(min(rank, scores_QC.shape[1]), dim=1).indices
        return is_pair_QC.gather(1, nearest_QK).any(1)
    best_Q1 = scores_QC.masked_fill(~is_pair_QC, -torch.inf).amax(1, keepdim=True)
    is_nearer_QC = scores_QC >= best_Q1 if ties == "against" else scores_QC > best_Q1
    return (is_nearer_QC & ~is_pair_QC).sum(1) < rank


def recalls(scores_IT: Tensor, is_pair_IT: Tensor, *, ties: Ties = "against") -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, by name; a share of the images and of the texts."""
    return {name: float(found.float().mean()) for name, found in all_hits(scores_IT, is_pair_IT, ties=ties).items()}


def all_hits(scores_IT: Tensor, is_pair_IT: Tensor, *, ties: Ties = "against") -> dict[str, Tensor]:
    """The same before the mean: which queries were hits, [I] or [T] by the metric's name."""
    found: dict[str, Tensor] = {}
    for direction, scores_QC, is_pair_QC in zip(
        DIRECTIONS, (scores_IT, scores_IT.T), (is_pair_IT, is_pair_IT.T), strict=True
    ):
        parts = list(zip(scores_QC.split(_QUERIES_AT_ONCE), is_pair_QC.split(_QUERIES_AT_ONCE), strict=True))
        for rank in RANKS:
            found[f"{direction}/recall_at_{rank}"] = torch.cat([hits(*part, rank, ties=ties) for part in parts])
    return found
