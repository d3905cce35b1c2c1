"""What BLIP-2's losses compute and keep, by arithmetic against PyTorch's own counter and the tensors themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batch import Batch, collate
from data_pipeline.index_build import build_index
from data_pipeline.sample import Encoded
from models.build import ModelMetadata, build_vlm, read_metadata
from tests.support.autograd import kept_by_autograd
from tests.support.flops import ProductCounter
from tests.support.qformer import qformer_recipe
from tests.support.shards import caption_sample, write_tar
from trainer.config.recipe import Recipe
from trainer.engine.train_step import TrainingTask
from trainer.engine.tuning import apply_plan
from trainer.flops.counts import count
from trainer.flops.estimator import flops_estimator
from trainer.flops.image_text_memory import pair_activations
from trainer.flops.shapes import model_shape
from trainer.objectives.image_text import ImageText
from trainer.validation.held_out import HeldOut

LOSSES = [("itc",), ("itm",), ("itg",), ("itc", "itm", "itg")]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, ModelMetadata, Batch]:
    """Eight pairs of equally long texts, so that none is padded."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "shards").mkdir()
    samples = [(f"{number:06d}", caption_sample(number, words=8)) for number in range(8)]
    write_tar(folder / "shards" / "shard-000000.tar", samples)
    build_index(folder / "shards")
    recipe = Recipe.model_validate(qformer_recipe(folder, folder / "shards"))
    data = recipe.stage("contrast").data
    facts = read_metadata(recipe.model, data.max_length, "projector")
    rows = [(sample,) for sample in HeldOut.open(data, facts, 8).encoded(range(8)) if isinstance(sample, Encoded)]
    assert len(rows) == 8
    return recipe, facts, collate(rows, facts.text)


def module_of(
    recipe: Recipe, facts: ModelMetadata, losses: tuple[str, ...], precision: str
) -> tuple[Any, TrainingTask]:
    objective = ImageText.model_validate({"losses": losses})
    stage = recipe.stage("contrast").model_copy(update={"objective": objective})
    frozen = torch.float32 if precision == "fp32" else torch.bfloat16
    vlm = build_vlm(recipe.model, facts, frozen_dtype=frozen, seed=0)
    vlm.vision.model.config._attn_implementation = "eager"
    apply_plan(vlm, stage.tune, seed=0)
    return stage, TrainingTask(vlm, objective.build(), precision).train()


def plain_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Products that the counter sees."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return (scores if attn_mask is None else scores.masked_fill(~attn_mask, -1e9)).softmax(-1) @ value


@pytest.mark.parametrize("losses", LOSSES, ids="+".join)
def test_the_count_is_pytorchs(
    pairs: tuple[Recipe, ModelMetadata, Batch], losses: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, facts, batch = pairs
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    stage, module = module_of(recipe, facts, losses, "fp32")
    with ProductCounter() as counter:
        module(batch).loss_sum.backward()
    computed = sum(part.total for part in flops_estimator(stage, model_shape(recipe.model))(count([batch])).values())
    # What the last layer makes of the text in ITM gets no gradient, and of queries in ITG: of two layers much.
    assert computed == pytest.approx(counter.total, rel={"itc": 0.01, "itg": 0.04}.get("+".join(losses), 0.11))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("losses", LOSSES, ids="+".join)
def test_the_estimate_is_what_tensors_take(
    pairs: tuple[Recipe, ModelMetadata, Batch], losses: tuple[str, ...], precision: str
) -> None:
    recipe, facts, batch = pairs
    _, module = module_of(recipe, facts, losses, precision)
    shape, element = model_shape(recipe.model).pairs, 4 if precision == "fp32" else 2
    assert shape is not None
    copies = 0 if element == 4 else 2 * sum(value.numel() for value in module.parameters() if value.requires_grad)
    kept = kept_by_autograd(module, batch) - copies
    assert pair_activations(shape, losses, count([batch]), element) == pytest.approx(kept, rel=0.15)
