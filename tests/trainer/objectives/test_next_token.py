"""A bad row is seen in its own sum; without any sample a batch still reaches every weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.batch import Batch, collate
from data_pipeline.sample import Encoded
from models.build import build_vlm, read_metadata
from models.spec import IGNORE_INDEX, TextSpec
from models.vlm import VLM
from tests.support.backbones import IMAGE_SIZE, NUM_IMAGE_TOKENS, tiny_recipe
from tests.support.samples import ref
from trainer.config.recipe import Recipe
from trainer.config.schema import EngineConfig
from trainer.engine.train_step import TrainingTask, configure_model
from trainer.objectives.next_token import NextTokenLoss

POISON = 77
"""A token whose embedding is NaN."""


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    recipe = Recipe.model_validate(tiny_recipe(tmp_path_factory.mktemp("parts"), Path("none")))
    vlm = build_vlm(recipe.model, read_metadata(recipe.model, 128), frozen_dtype=torch.float32, seed=0)
    with torch.no_grad():
        vlm.language.get_input_embeddings().weight[POISON] = torch.nan
    return vlm


def sample(text: TextSpec, seed: int, num_tiles: int, *, poisoned: bool = False) -> Encoded:
    numbers = np.random.default_rng(seed)
    words = numbers.integers(3, 70, 9).astype(np.int32)
    if poisoned:
        words[4] = POISON
    ids = np.concatenate([np.full(NUM_IMAGE_TOKENS * num_tiles, text.image_token_id, np.int32), words])
    labels = np.where(np.arange(len(ids)) < len(ids) - 5, IGNORE_INDEX, ids)
    tiles = numbers.integers(0, 256, (num_tiles, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Encoded(ref(seed), ids, labels, tiles, ((IMAGE_SIZE, IMAGE_SIZE),) * num_tiles)


def gradients(vlm: VLM, batch: Batch) -> tuple[float, list[float], dict[str, torch.Tensor]]:
    vlm.zero_grad()
    sums = TrainingTask(vlm, NextTokenLoss(), "fp32")(batch)
    sums.loss_sum.backward()
    found = {name: value.grad.clone() for name, value in vlm.named_parameters() if value.grad is not None}
    return float(sums.loss_sum.detach()), sums.row_loss_sums_B.tolist(), found


def test_a_bad_row_is_named(vlm: VLM) -> None:
    text = TextSpec(max_length=128, image_token_id=vlm.image_token_id, pad_token_id=0, vocab_size=80)
    good, other = (sample(text, 1, 1), sample(text, 2, 0)), (sample(text, 3, 1),)
    bad = (sample(text, 4, 1), sample(text, 5, 2, poisoned=True))
    _, found, _ = gradients(vlm, collate([good, bad, other], text))
    assert [bool(np.isfinite(value)) for value in found] == [True, False, True]
    loss, emptied, _ = gradients(vlm, collate([good, (), other], text))
    assert emptied == pytest.approx([found[0], 0.0, found[2]], rel=1e-5)
    assert loss == pytest.approx(found[0] + found[2], rel=1e-5)


def test_a_batch_of_empty_rows_still_reaches_every_weight(vlm: VLM) -> None:
    text = TextSpec(max_length=128, image_token_id=vlm.image_token_id, pad_token_id=0, vocab_size=80)
    loss, rows, found = gradients(vlm, collate([(), ()], text))
    assert (loss, rows) == (0.0, [0.0, 0.0])
    assert all(not gradient.any() for gradient in found.values())
    assert {"vision", "projector", "language"} == {name.split(".")[0] for name in found}


@pytest.mark.parametrize(("asked", "num_layers"), [(False, 0), (1, 1), (True, 2), (40, 2)])
def test_the_engine_s_choices_reach_the_model(vlm: VLM, asked: bool | int, num_layers: int) -> None:
    """A recomputed layer runs once more in the backward."""
    engine = EngineConfig.model_validate({"activation_checkpointing": asked, "precision": "fp32"})
    configure_model(vlm, engine)
    text = TextSpec(max_length=128, image_token_id=vlm.image_token_id, pad_token_id=0, vocab_size=80)
    runs: list[int] = []
    norms = [layer.input_layernorm for layer in vlm.language.model.layers]
    hooks = [norm.register_forward_hook(lambda *_: runs.append(1)) for norm in norms]
    gradients(vlm, collate([(sample(text, 1, 1),)], text))
    for hook in hooks:
        hook.remove()
    configure_model(vlm, EngineConfig(precision="fp32"))
    assert len(runs) == 2 + num_layers
