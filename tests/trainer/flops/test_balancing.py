"""Rows are dealt to micro-batches by cost: nothing is lost, nothing is twice, and none is much dearer than another."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from data_pipeline.feed import feed
from data_pipeline.sample import Encoded, Row
from models.common.source import PartFacts
from models.config import ModelConfig
from models.spec import TextSpec
from tests.support.samples import ref
from trainer.config.tuning import Full, TuningPlan
from trainer.flops.balancing import balance, in_order, row_costs, rows_of
from trainer.flops.language import needed_flops
from trainer.flops.shapes import model_shape

TEXT = TextSpec(max_length=64, image_token_id=9, pad_token_id=0, vocab_size=10)


def row(num_tokens: int, num_tiles: int = 0) -> Row:
    ids = np.ones(num_tokens, np.int32)
    return (Encoded(ref(num_tokens), ids, ids, np.zeros((num_tiles, 4, 4, 3), np.uint8)),)


@pytest.mark.parametrize(("num_rows", "size", "number"), [(16, 4, 4), (13, 4, 4), (3, 4, 1), (1, 1, 3), (0, 2, 2)])
def test_each_row_is_dealt_once_and_values_come_back_in_order(num_rows: int, size: int, number: int) -> None:
    costs = np.random.default_rng(0).integers(1, 1000, num_rows).astype(float).tolist()
    parts = balance(costs, size, number)
    assert len(parts) == number
    assert all(len(part) <= size and part == sorted(part) for part in parts)
    assert sorted(place for part in parts for place in part) == list(range(num_rows))
    computed = [value for part in parts for value in [costs[place] for place in part] or [0.0]]
    assert in_order(parts, computed) == costs
    assert balance(costs, size, number) == parts


def test_micro_batches_cost_alike_and_stand_in_the_same_order_on_every_rank() -> None:
    """Long-tailed lengths, 16 rows as 4 micro-batches of 4; unbalanced, the most expensive is a quarter above the
    mean."""
    worst_dealt, worst_as_they_come = [], []
    for seed in range(50):
        costs = np.exp(np.random.default_rng(seed).normal(0, 0.5, 16))
        sums = [float(costs[part].sum()) for part in balance(costs.tolist(), 4, 4)]
        assert sums == sorted(sums, reverse=True)
        worst_dealt.append(sums[0] / costs.sum() * 4)
        worst_as_they_come.append(costs.reshape(4, 4).sum(1).max() / costs.sum() * 4)
    assert np.mean(worst_dealt) < 1.08
    assert np.mean(worst_as_they_come) > 1.25


def test_a_micro_batch_without_rows_is_one_empty_row() -> None:
    """A rank with fewer rows than micro-batches still has a batch for each: the others wait for it."""
    rows = [row(7)]
    batches = list(feed(rows_of(rows, balance([7.0], 1, 2)), TEXT, torch.device("cpu")))
    assert [batch.num_tokens for batch in batches] == [7, 0]
    assert batches[1].layout.without_padding(batches[1].tokens.input_ids_BL).tolist() == [0]


def test_a_row_costs_what_its_images_and_its_tokens_cost() -> None:
    """Qwen2.5-0.5B behind CLIP ViT-L/14-336: an image costs as many FLOPs as hundreds of words."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    language = {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    model = ModelConfig.model_validate(
        {
            "vision": {"kind": "clip", "path": "vision", "feature_layer": -2},
            "projector": {"kind": "mlp"},
            "language": {"kind": "pretrained", "path": "language"},
        }
    )
    facts = {"vision": vision, "language": language}
    shape = model_shape(model, lambda path: PartFacts(facts[path], path, None))
    estimate = partial(needed_flops, shape, TuningPlan(projector=Full(learning_rate=1e-3)))
    plain, with_image, longer = row_costs([row(600), row(600, 1), row(700)], estimate)
    assert plain < longer < with_image
    assert row_costs([row(600), row(7)], None) == [600, 7]
