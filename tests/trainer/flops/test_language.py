"""The count by arithmetic against PyTorch's own counter, for every way to tune; and the published figures."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.batch import collate
from data_pipeline.sample import Encoded
from models.build import build_vlm, read_metadata
from models.common.source import PartFacts
from models.mtp.parallel import ParallelFuture
from models.mtp.sequential import SequentialFuture
from models.shapes import Counts
from tests.support.backbones import tiny_recipe
from tests.support.flops import ProductCounter
from tests.support.paths import REPOSITORY
from tests.support.shards import write_set
from trainer.config.recipe import Recipe, load_recipe
from trainer.config.tuning import Full, Lora, TuningPlan
from trainer.engine.train_step import TrainingTask
from trainer.engine.tuning import apply_plan
from trainer.flops.counts import count
from trainer.flops.estimator import flops_estimator
from trainer.flops.language import needed_flops
from trainer.flops.shapes import model_shape
from trainer.objectives.multi_token import MultiToken
from trainer.objectives.next_token import NextToken
from trainer.validation.held_out import HeldOut

FULL, LORA = Full(learning_rate=1.0), Lora(learning_rate=1.0, rank=4, alpha=8)
FUTURES = {"parallel": ParallelFuture(num_tokens=3), "sequential": SequentialFuture()}
PLANS = {
    "align": TuningPlan(projector=FULL),
    "lora": TuningPlan(projector=FULL, language=LORA),
    "full": TuningPlan(projector=FULL, language=FULL),
    "all": TuningPlan(vision=FULL, projector=FULL, language=FULL),
    "language": TuningPlan(language=LORA),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("flops")
    write_set(folder / "shards", [4], words=20)
    values = tiny_recipe(folder, folder / "shards")
    values["model"]["vision"]["feature_layer"] = -1  # every layer is needed
    return Recipe.model_validate_json(json.dumps(values))


def measured(recipe: Recipe, plan: TuningPlan) -> tuple[float, Counts, Counts]:
    """PyTorch's count of a step of equally long rows; what the rows hold; and the same without a mask."""
    facts = read_metadata(recipe.model, 256)
    vlm = build_vlm(recipe.model, facts, frozen_dtype=torch.float32, seed=0)
    vlm.vision.model.config._attn_implementation = "eager"  # products that the counter sees, over all pairs
    vlm.language.config._attn_implementation = "eager"
    apply_plan(vlm, plan, seed=0)
    held_out = HeldOut.open(recipe.stage("align").data, facts, 1)
    (sample,) = held_out.encoded(range(1))
    batch = collate([(sample,), (sample,), (sample,)], facts.text)  # type: ignore[arg-type]
    module = TrainingTask(vlm, NextToken().build(), "fp32")
    with ProductCounter() as counter:
        module(batch).loss_sum.backward()
    counts = count([batch])
    # Rows run one after another, and eager attention computes what its mask takes away; of the last layer's attention,
    # which is PyTorch's own, nothing is counted.
    return counter.total, counts, Counts(counts.tokens, counts.targets, counts.tiles, counts.tokens**2, 0)


@pytest.mark.parametrize("name", PLANS)
def test_the_count_is_pytorchs(recipe: Recipe, name: str) -> None:
    model: Any = recipe.model
    shape = model_shape(model)
    found, counts, unmasked = measured(recipe, PLANS[name])
    length = counts.tokens / 3
    assert counts.causal_pairs == 3 * length * (length + 1) / 2
    computed = sum(part.total for part in needed_flops(shape, PLANS[name], unmasked).values())
    # The loss computes its logits again where the head learns: not needed, and 6 % of so small a model.
    assert computed == pytest.approx(found, rel=0.07 if isinstance(PLANS[name].language, Full) else 0.02)


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
@pytest.mark.parametrize("name", ["align", "lora", "language", "nothing"])
def test_heads_for_further_tokens_are_counted(recipe: Recipe, kind: str, name: str) -> None:
    """Every position a target, as the heads compute them all; their attention is PyTorch's own, and not counted."""
    model = recipe.model.model_copy(update={"future": FUTURES[kind]})
    plan = {**PLANS, "nothing": TuningPlan()}[name].model_copy(update={"future": FULL})
    facts = read_metadata(model, 256)
    vlm = build_vlm(model, facts, frozen_dtype=torch.float32, seed=0)
    vlm.vision.model.config._attn_implementation = "eager"
    vlm.language.config._attn_implementation = "eager"
    apply_plan(vlm, plan, seed=0)
    (sample,) = HeldOut.open(recipe.stage("align").data, facts, 1).encoded(range(1))
    assert isinstance(sample, Encoded)
    labels = np.where(sample.input_ids == facts.text.image_token_id, 5, sample.input_ids)
    batch = collate([(replace(sample, labels=labels),)], facts.text)
    module = TrainingTask(vlm, MultiToken().build(), "fp32")
    with ProductCounter() as counter:
        module(batch).loss_sum.backward()
    counts = count([batch])
    shape = model_shape(model)
    seen = Counts(counts.tokens, counts.targets, counts.tiles, counts.tokens**2, 0)
    parts = needed_flops(shape, plan, seen)
    assert sum(part.total for part in parts.values()) == pytest.approx(counter.total, rel=0.03)
    assert parts["future"].total > 0.1 * counter.total
    assert "future" not in flops_estimator(recipe.stage("align"), shape)(seen)  # next_token does not run them


@pytest.mark.parametrize(("language", "tflops"), [(None, 19.71), (16, 19.88), (128, 21.10), ("full", 29.14)], ids=str)
def test_a_sample_of_llava_costs_what_is_known(language: Any, tflops: float) -> None:
    clip = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vicuna = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    model = load_recipe(REPOSITORY / "recipes" / "llava15_vicuna7b.yaml").model
    facts = {
        "openai/clip-vit-large-patch14-336": {**clip, "image_size": 336, "patch_size": 14},
        "lmsys/vicuna-7b-v1.5": {**vicuna, "vocab_size": 32000},
    }
    shape = model_shape(model, lambda path: PartFacts(facts[path], path, None))
    plans = {None: PLANS["align"], "full": PLANS["full"]}
    rank = Lora(learning_rate=1.0, rank=language, alpha=1.0) if isinstance(language, int) else LORA
    plan = plans.get(language, TuningPlan(projector=FULL, language=rank))
    sample = Counts.of_sample(726, 100, 1)
    everywhere = Counts(726, 726, 1, sample.causal_pairs, sample.causal_pairs)
    head = 2 * (726 - 100) * 4096 * 32000 * (3 if language == "full" else 2)
    whole = sum(part.total for part in needed_flops(shape, plan, everywhere).values()) - head
    assert whole / 1e12 == pytest.approx(tflops, abs=0.005)
    # Of the last layer's rows 626 of 726 are needed for keys and values alone: 2.25 % of a step with a frozen decoder.
    needed = sum(part.total for part in needed_flops(shape, plan, sample).values())
    assert needed / whole == pytest.approx(1 - 0.0225, abs=0.0025)
