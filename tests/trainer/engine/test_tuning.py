"""Tuning plans: what learns, in which precision, at which rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.build import build_vlm, read_metadata
from models.common.errors import InputError
from models.vlm import VLM
from tests.support.backbones import tiny_recipe
from trainer.config.recipe import Recipe
from trainer.config.tuning import Frozen, Full, Lora, TuningPlan
from trainer.engine.tuning import apply_plan


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("tuning")
    return Recipe.model_validate_json(Recipe.model_validate(tiny_recipe(folder, Path("none"))).model_dump_json())


def model(recipe: Recipe, dtype: torch.dtype = torch.bfloat16) -> VLM:
    return build_vlm(recipe.model, read_metadata(recipe.model, 128), frozen_dtype=dtype, seed=0)


def test_what_learns_is_in_fp32_and_the_rest_is_not(recipe: Recipe) -> None:
    vlm = model(recipe)
    apply_plan(
        vlm, TuningPlan(projector=Full(learning_rate=1e-3), language=Lora(learning_rate=1e-4, rank=2, alpha=4)), seed=0
    )
    for name, parameter in vlm.named_parameters():
        learns = name.startswith("projector.") or ".lora_" in name
        assert parameter.requires_grad == learns, name
        assert parameter.dtype == (torch.float32 if learns else torch.bfloat16), name


def test_adapters_start_as_nothing_and_are_the_same_for_a_seed(recipe: Recipe) -> None:
    plan = TuningPlan(language=Lora(learning_rate=1e-4, rank=2, alpha=4))
    first, second, third = (model(recipe) for _ in range(3))
    for vlm, seed in ((first, 1), (second, 1), (third, 2)):
        apply_plan(vlm, plan, seed=seed)
    down = [name for name, _ in first.named_parameters() if ".lora_A." in name]
    weights = [dict(vlm.named_parameters()) for vlm in (first, second, third)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in down)
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in down)
    assert all(not value.any() for name, value in weights[0].items() if ".lora_B." in name)
    assert not any("lm_head" in name or "vision" in name for name in down)


def test_rates_and_decay_by_part_and_by_module(recipe: Recipe) -> None:
    plan = TuningPlan(
        projector=Full(learning_rate=1e-3, learning_rates={"linear_2": 5e-4}, weight_decay=0.1),
        language=Full(learning_rate=1e-5, weight_decay=0.01),
    )
    groups = apply_plan(model(recipe), plan, seed=0)
    by_name = {name: group for group in groups for name in group.names}
    assert by_name["projector.linear_1.weight"].learning_rate == 1e-3
    assert by_name["projector.linear_2.weight"].learning_rate == 5e-4
    assert by_name["projector.linear_1.weight"].weight_decay == 0.1
    assert by_name["projector.linear_1.bias"].weight_decay == 0.0
    assert by_name["language.model.norm.weight"].weight_decay == 0.0
    assert by_name["language.lm_head.weight"].learning_rate == 1e-5


def test_a_plan_in_which_nothing_learns_gives_no_groups(recipe: Recipe) -> None:
    assert apply_plan(model(recipe), TuningPlan(vision=Frozen()), seed=0) == []


def test_named_modules_stay_frozen_and_a_wrong_name_is_told(recipe: Recipe) -> None:
    vlm = model(recipe)
    (group,) = apply_plan(vlm, TuningPlan(projector=Full(learning_rate=1e-3, frozen=("linear_1",))), seed=0)[:1]
    learning = {name for name, value in vlm.named_parameters() if value.requires_grad}
    assert learning == {"projector.linear_2.weight", "projector.linear_2.bias"}
    assert set(group.names) == learning
    with pytest.raises(InputError, match=r"tune\.projector: linear_9 names no module of it; .* linear_1, linear_2"):
        apply_plan(vlm, TuningPlan(projector=Full(learning_rate=1e-3, learning_rates={"linear_9": 1e-4})), seed=0)


def test_a_vision_encoder_learns_as_far_as_its_features_reach(recipe: Recipe) -> None:
    """Two layers, of which the first one's states are the features."""
    vlm = model(recipe)
    apply_plan(vlm, TuningPlan(vision=Full(learning_rate=1e-5)), seed=0)
    learning = {name for name, value in vlm.vision.named_parameters() if value.requires_grad}
    assert any(".layers.0." in name for name in learning)
    assert any("patch_embedding" in name for name in learning)
    assert not any(".layers.1." in name or "post_layernorm" in name for name in learning)
    assert all(value.grad is None for value in vlm.vision.parameters())


def lora(*targets: str, **more: Any) -> TuningPlan:
    return TuningPlan(language=Lora(learning_rate=1e-4, rank=2, alpha=4, targets=targets, **more))


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (("q_proj", "k_prj", "gate_prj"), r"k_prj, gate_prj names no layer .*; did you mean k_proj, gate_proj\?"),
        (("qkv_proj",), "qkv_proj names no layer"),
        (("lm_head",), "lm_head names no layer"),
        (("mlp",), "mlp names no layer"),
        (("all_linear",), "all_linear names no layer"),
    ],
)
def test_every_target_must_name_a_layer(recipe: Recipe, targets: tuple[str, ...], named: str) -> None:
    with pytest.raises(InputError, match=named):
        apply_plan(model(recipe), lora(*targets), seed=0)


def test_an_embedding_is_adapted_where_it_is_not_the_head_too(recipe: Recipe) -> None:
    vlm = model(recipe)
    (group, *_) = apply_plan(vlm, lora("embed_tokens", "layers.0.mlp.up_proj"), seed=0)
    assert sum(".lora_embedding_" in name for name in group.names) == 2
    assert sum(".lora_A." in name for name in group.names) == 1
    with pytest.raises(InputError, match=r"dora: an embedding takes LoRA alone"):
        apply_plan(model(recipe), lora("embed_tokens", dora=True), seed=0)
    tied = model(recipe)
    tied.language.config.tie_word_embeddings = True
    with pytest.raises(InputError, match=r"the embedding is the output head as well"):
        apply_plan(tied, lora("embed_tokens"), seed=0)
