"""A bad row is seen in its own sum, and leaves nothing behind when it is not kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.batch import Batch, collate
from data_pipeline.sample import Draw, Encoded
from models.build import build_vlm, read_facts
from models.spec import IGNORE_INDEX, TextSpec
from models.vlm import VLM
from tests.support.backbones import IMAGE_SIZE, NUM_IMAGE_TOKENS, tiny_recipe
from trainer.config import EngineConfig, NextToken
from trainer.objectives import NextTokenLoss
from trainer.recipe import Recipe
from trainer.step import TrainStep, set_up

POISON = 77
"""A token whose embedding is NaN."""


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    recipe = Recipe.model_validate(tiny_recipe(tmp_path_factory.mktemp("parts"), Path("none")))
    vlm = build_vlm(recipe.model, read_facts(recipe.model, 128), frozen_dtype=torch.float32, seed=0)
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
    return Encoded(Draw(0, seed), "s.tar", str(seed), ids, labels, tiles, ((IMAGE_SIZE, IMAGE_SIZE),) * num_tiles)


def gradients(vlm: VLM, batch: Batch, keep: list[bool] | None) -> tuple[float, list[float], dict[str, torch.Tensor]]:
    vlm.zero_grad()
    sums = TrainStep(vlm, NextTokenLoss(NextToken()), "fp32")(batch, keep)
    sums.loss_sum.backward()
    found = {name: value.grad.clone() for name, value in vlm.named_parameters() if value.grad is not None}
    return float(sums.loss_sum.detach()), sums.row_loss_sums_B.tolist(), found


def test_a_bad_row_is_named_and_leaves_no_trace_in_the_gradients(vlm: VLM) -> None:
    """Full training: every weight's gradient, by value, is that of the batch in which the bad row was empty."""
    text = TextSpec(max_length=128, image_token_id=vlm.image_token_id, pad_token_id=0, vocab_size=80)
    good, other = (sample(text, 1, 1), sample(text, 2, 0)), (sample(text, 3, 1),)
    bad = (sample(text, 4, 1), sample(text, 5, 2, poisoned=True))
    _, found, _ = gradients(vlm, collate([good, bad, other], text), None)
    keep = [bool(np.isfinite(value)) for value in found]
    assert keep == [True, False, True]

    alone = collate([good, (), other], text)
    loss, _, kept = gradients(vlm, collate([good, bad, other], text), keep)
    expected_loss, _, expected = gradients(vlm, alone, None)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert kept.keys() == expected.keys()
    assert len(kept) > 40
    for name, gradient in kept.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_of_which_no_row_is_kept_still_reaches_every_weight(vlm: VLM) -> None:
    text = TextSpec(max_length=128, image_token_id=vlm.image_token_id, pad_token_id=0, vocab_size=80)
    batch = collate([(sample(text, 1, 1, poisoned=True),)], text)
    loss, rows, found = gradients(vlm, batch, [False])
    assert (loss, rows) == (0.0, [0.0])
    assert all(not gradient.any() for gradient in found.values())
    assert {"vision", "projector", "language"} == {name.split(".")[0] for name in found}


@pytest.mark.parametrize(("asked", "num_layers"), [(False, 0), (1, 1), (True, 2), (40, 2)])
def test_the_engine_s_choices_reach_the_model(vlm: VLM, asked: bool | int, num_layers: int) -> None:
    """A recomputed layer runs once more in the backward."""
    engine = EngineConfig.model_validate({"activation_checkpointing": asked, "precision": "fp32"})
    set_up(vlm, engine)
    text = TextSpec(max_length=128, image_token_id=vlm.image_token_id, pad_token_id=0, vocab_size=80)
    runs: list[int] = []
    norms = [layer.input_layernorm for layer in vlm.language.model.layers]
    hooks = [norm.register_forward_hook(lambda *_: runs.append(1)) for norm in norms]
    gradients(vlm, collate([(sample(text, 1, 1),)], text), None)
    for hook in hooks:
        hook.remove()
    set_up(vlm, EngineConfig(precision="fp32"))
    assert len(runs) == 2 + num_layers
