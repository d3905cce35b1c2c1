"""The decoder from scratch with heads for future tokens, end to end; and what its objective counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.batch import collate
from data_pipeline.sample import Draw, Encoded
from models.build import build_vlm, read_facts
from models.config import ParallelFuture, SequentialFuture
from models.spec import IGNORE_INDEX
from tests.support.backbones import tiny_recipe
from tests.support.families import answer_and_score, merge_and_open, train_and_resume
from tests.support.shards import write_set
from tests.support.training import losses, weights
from trainer.config import MultiToken
from trainer.objectives import MultiTokenLoss, build_objective, future_targets
from trainer.recipe import Recipe
from trainer.tuning import apply_plan


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("decoder")
    write_set(folder / "shards", [8], words=6)
    made = tiny_recipe(folder, folder / "shards")
    shape = {"num_layers": 2, "num_heads": 4, "width": 32, "max_positions": 512}
    made["model"] |= {
        "projector": {"kind": "linear"},
        "language": {"kind": "decoder", "tokenizer": str(folder / "language"), **shape},
        "future": {"kind": "parallel", "num_tokens": 3},
    }
    full = {"kind": "full", "learning_rate": 1e-2}
    pretrain, lora = made["stages"]["align"], made["stages"]["lora"]
    for stage in (pretrain, lora):
        stage["objective"] = {"kind": "multi_token"}
        stage["data"] = {**stage["data"], "packing": {"kind": "pack", "row_tokens": 256}}
    pretrain["tune"] = {"projector": full, "language": full, "future": full}
    lora |= {"init": "pretrain", "tune": {**lora["tune"], "future": full}}
    made["stages"] = {"pretrain": pretrain, "lora": lora}
    return made


@pytest.mark.slow
def test_the_family_works_end_to_end(recipe: dict[str, Any], tmp_path: Path) -> None:
    train_and_resume(recipe)
    found = losses(recipe, "pretrain")
    assert found[-1] < 0.8 * found[0]
    assert losses(recipe, "lora")[0] < 0.9 * found[0], "the second stage has the decoder of the first"
    predictor = merge_and_open(recipe, tmp_path / "bundle")
    assert type(predictor.model).__name__ == "SightlineForConditionalGeneration"
    trained = weights(recipe, "lora")
    for name, value in predictor.model.future.named_parameters():
        torch.testing.assert_close(value, trained[f"future.{name}"], rtol=0, atol=0)
    answer_and_score(predictor, tmp_path)
    assert predictor.speculation is not None
    assert predictor.speculation.num_forwards > 0


def sample(number: int, ids: list[int], labels: list[int]) -> Encoded:
    import numpy as np

    tiles = np.zeros((0, 48, 48, 3), dtype=np.uint8)
    return Encoded(Draw(0, number), "shard", str(number), np.array(ids), np.array(labels), tiles)


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_heads_are_taught_inside_a_sample_and_its_targets_alone(recipe: dict[str, Any], kind: str) -> None:
    """A packed row of two samples, the first with two answers: written out by hand, and the loss computed by parts."""
    model = Recipe.model_validate(recipe, strict=False).model
    future = ParallelFuture(num_tokens=3) if kind == "parallel" else SequentialFuture()
    model = model.model_copy(update={"future": future})
    facts = read_facts(model, 256)
    no = IGNORE_INDEX
    first = sample(0, [5, 6, 7, 8, 9, 10], [no, 6, 7, no, 9, 10])
    second = sample(1, [20, 21, 22, 23], [no, 21, 22, 23])
    batch = collate([(first, second), (second,)], facts.text)
    assert batch.supervised_K.tolist() == [0, 1, 3, 4, 6, 7, 8, 10, 11, 12]
    assert future_targets(batch, 1).tolist() == [7, no, 10, no, 22, 23, no, 22, 23, no]
    assert future_targets(batch, 2).tolist() == [no, 9, no, no, 23, no, no, 23, no, no]
    vlm = build_vlm(model, facts, frozen_dtype=torch.float32, seed=0)
    found = MultiTokenLoss(MultiToken(weight=0.5))(vlm, batch)
    total = torch.zeros(())
    for ids, labels in ((first.input_ids, first.labels), (second.input_ids, second.labels)):
        times = 1 if ids is first.input_ids else 2
        table = vlm.language.get_input_embeddings()(torch.tensor(ids)[None])
        states = vlm.language.model(inputs_embeds=table, use_cache=False).last_hidden_state
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None, None]
        heads = [states, *vlm.future(states, table.roll(-1, dims=1), attention_mask=causal)]
        for distance, states_1LD in enumerate(heads):
            for place in range(len(ids) - 1 - distance):
                if labels[place + 1] == no or labels[place + 1 + distance] == no:
                    continue
                logits = vlm.head(states_1LD[0, place])
                loss = F.cross_entropy(logits, torch.tensor(labels[place + 1 + distance]))
                total = total + times * (0.5 if distance else 1.0) * loss
    torch.testing.assert_close(found.loss_sum, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.row_loss_sums_B.sum(), total.detach(), rtol=1e-5, atol=1e-5)


def test_heads_are_added_to_a_pretrained_language_model_beside_lora(tmp_path: Path) -> None:
    """The heads and the adapters learn, the base does not; an empty row keeps every rank's weights in the graph."""
    made = tiny_recipe(tmp_path, tmp_path / "shards")
    made["model"]["future"] = {"kind": "sequential"}
    stage = made["stages"]["lora"]
    stage |= {"init": None, "objective": {"kind": "multi_token", "weight": 0.3}}
    stage["tune"]["future"] = {"kind": "full", "learning_rate": 1e-3}
    checked = Recipe.model_validate_json(json.dumps(made))
    facts = read_facts(checked.model, 256)
    vlm = build_vlm(checked.model, facts, frozen_dtype=torch.float32, seed=0)
    groups = apply_plan(vlm, checked.stage("lora").tune, seed=0)
    learning = {name for group in groups for name in group.names}
    assert any(name.startswith("future.") for name in learning)
    batch = collate([(sample(0, [5, 6, 7, 8], [IGNORE_INDEX, 6, 7, 8]),), ()], facts.text)
    for rows in (batch, collate([()], facts.text)):
        build_objective(checked.stage("lora").objective)(vlm, rows).loss_sum.backward()
        for name, value in vlm.named_parameters():
            assert (value.grad is not None) == (name in learning), name
            value.grad = None
