"""The module that the engine wraps: what precision and activation checkpointing mean for a tiny model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.build import build_vlm, read_metadata
from models.vlm import VLM
from tests.support.backbones import tiny_recipe
from trainer.config.recipe import Recipe
from trainer.config.schema import EngineConfig
from trainer.config.tuning import Lora, TuningPlan
from trainer.engine.train_step import DTYPES, TrainingTask, configure_model
from trainer.engine.tuning import apply_plan
from trainer.objectives.loss_sum import LossSum


class Linear(nn.Module):
    """Stands for a model: weights in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)


def seen_dtype(model: Any, batch: Any) -> LossSum:
    """Stands for an objective: says in which dtype a product of the model is."""
    product: Tensor = model.layer(torch.ones(1, 2))
    return LossSum(product.sum(), torch.zeros(()), product.detach().sum(-1))


@pytest.mark.parametrize("precision", DTYPES)
def test_it_computes_in_the_precision_over_fp32_weights(precision: str) -> None:
    model: Any = Linear()
    task = TrainingTask(model, seen_dtype, precision)
    batch: Any = SimpleNamespace(device=torch.device("cpu"))
    sums = task(batch)
    assert sums.loss_sum.dtype == DTYPES[precision]
    sums.loss_sum.backward()
    assert model.layer.weight.dtype == torch.float32
    assert model.layer.weight.grad.dtype == torch.float32


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe.model_validate(tiny_recipe(tmp_path_factory.mktemp("task"), Path("none")))


def adapted(recipe: Recipe) -> VLM:
    vlm = build_vlm(recipe.model, read_metadata(recipe.model, 128), frozen_dtype=torch.float32, seed=0)
    apply_plan(vlm, TuningPlan(language=Lora(learning_rate=1e-4, rank=2, alpha=4)), seed=0)
    return vlm


def casting_modules(vlm: VLM) -> set[bool]:
    return {module.cast_input_dtype_enabled for module in vlm.modules() if hasattr(module, "cast_input_dtype_enabled")}


def test_adapters_cast_their_input_in_fp32_only(recipe: Recipe) -> None:
    """Under autocast the cast would be undone at once, and both copies kept."""
    found = {}
    for precision in ("fp32", "bf16"):
        vlm = adapted(recipe)
        configure_model(vlm, EngineConfig.model_validate({"precision": precision}))
        found[precision] = casting_modules(vlm)
    assert found == {"fp32": {True}, "bf16": {False}}


@pytest.mark.parametrize(("setting", "num_layers"), [(True, 2), (False, 0), (1, 1)])
def test_so_many_layers_are_recomputed(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, setting: bool | int, num_layers: int
) -> None:
    vlm = adapted(recipe)
    seen: list[int] = []
    monkeypatch.setattr(vlm.decoder, "recompute", seen.append)
    configure_model(vlm, EngineConfig.model_validate({"precision": "fp32", "activation_checkpointing": setting}))
    assert seen == [num_layers]
