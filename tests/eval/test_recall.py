"""Recall beside CLIP_benchmark's own arithmetic, with one to seven captions an image, and ties both ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eval.recall import METRICS, RANKS, hits, recalls


def published(scores_QC: Tensor, positive_pairs_QC: Tensor, k: int) -> float:
    """CLIP_benchmark's `recall_at_k` and its mean, written after its description: the share of positives among the
    k that torch.topk names, and a query counts where that share is above 0."""
    topk_indices = torch.topk(scores_QC, k, dim=1)[1]
    onehot = torch.nn.functional.one_hot(topk_indices, num_classes=scores_QC.shape[1])
    true_positives = (onehot * positive_pairs_QC.reshape(len(scores_QC), 1, -1)).sum(dim=(1, 2))
    return float((true_positives / positive_pairs_QC.sum(dim=1) > 0).float().mean())


def pairs(num_captions: list[int]) -> Tensor:
    is_pair_IT = torch.zeros(len(num_captions), sum(num_captions), dtype=torch.bool)
    start = 0
    for image, count in enumerate(num_captions):
        is_pair_IT[image, start : start + count] = True
        start += count
    return is_pair_IT


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", ["against", "for", "topk"])
def test_recall_is_clip_benchmarks(seed: int, ties: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_captions = torch.randint(1, 8, (40,), generator=generator).tolist()
    is_pair_IT = pairs(num_captions)
    scores_IT = torch.randn(is_pair_IT.shape, generator=generator) + 1.5 * is_pair_IT
    found = recalls(scores_IT, is_pair_IT, ties=ties)  # type: ignore[arg-type]
    expected = [published(scores_IT, is_pair_IT, k) for k in RANKS]
    expected += [published(scores_IT.T, is_pair_IT.T, k) for k in RANKS]
    assert found == pytest.approx(dict(zip(METRICS, expected, strict=True)), abs=1e-7)


def test_ties_count_as_asked_and_topk_as_published() -> None:
    generator = torch.Generator().manual_seed(1)
    is_pair_IT = pairs([2] * 30)
    scores_IT = torch.randint(0, 3, is_pair_IT.shape, generator=generator).float() + is_pair_IT
    against, topk, lenient = (recalls(scores_IT, is_pair_IT, ties=ties) for ties in ("against", "topk", "for"))
    for name in METRICS:
        assert against[name] <= topk[name] <= lenient[name]
    assert against != lenient
    assert topk["image_to_text/recall_at_5"] == published(scores_IT, is_pair_IT, 5)


def test_two_captions_of_one_image_are_no_rivals() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5]])
    is_pair = torch.tensor([[False, True, True]])
    assert hits(scores, is_pair, 1).tolist() == [False]
    assert hits(scores, is_pair, 2).tolist() == [True]
