"""Multi-token prediction: which head is taught where, by hand; and what learns beside a pretrained language model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from data_pipeline.batch import collate
from data_pipeline.sample import Encoded
from models.build import build_vlm, read_metadata
from models.config import ModelConfig
from models.spec import IGNORE_INDEX
from tests.support.backbones import tiny_recipe
from tests.support.samples import ref
from trainer.config.recipe import Recipe
from trainer.engine.tuning import apply_plan
from trainer.objectives.multi_token import MultiToken, mtp_targets


def sample(number: int, ids: list[int], labels: list[int]) -> Encoded:
    tiles = np.zeros((0, 48, 48, 3), dtype=np.uint8)
    return Encoded(ref(number), np.array(ids), np.array(labels), tiles)


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_heads_are_taught_inside_a_sample_and_its_targets_alone(tmp_path: Path, kind: str) -> None:
    """A packed row of two samples, the first with two answers: written out by hand, and the loss computed by parts."""
    made = tiny_recipe(tmp_path, tmp_path / "shards")["model"]
    shape = {"num_layers": 2, "num_heads": 4, "width": 32, "max_positions": 512}
    made["language"] = {"kind": "decoder", "tokenizer": str(tmp_path / "language"), **shape}
    made["future"] = {"kind": "parallel", "num_tokens": 3} if kind == "parallel" else {"kind": "sequential"}
    model = ModelConfig.model_validate(made)
    facts = read_metadata(model, 256)
    no = IGNORE_INDEX
    first = sample(0, [5, 6, 7, 8, 9, 10], [no, 6, 7, no, 9, 10])
    second = sample(1, [20, 21, 22, 23], [no, 21, 22, 23])
    batch = collate([(first, second), (second,)], facts.text)
    assert batch.layout.supervised_K.tolist() == [0, 1, 3, 4, 6, 7, 8, 10, 11, 12]
    assert mtp_targets(batch, 1).tolist() == [7, no, 10, no, 22, 23, no, 22, 23, no]
    assert mtp_targets(batch, 2).tolist() == [no, 9, no, no, 23, no, no, 23, no, no]
    vlm = build_vlm(model, facts, frozen_dtype=torch.float32, seed=0)
    found = MultiToken(weight=0.5).build()(vlm, batch)
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
    facts = read_metadata(checked.model, 256)
    vlm = build_vlm(checked.model, facts, frozen_dtype=torch.float32, seed=0)
    groups = apply_plan(vlm, checked.stage("lora").tune, seed=0)
    learning = {name for group in groups for name in group.names}
    assert any(name.startswith("future.") for name in learning)
    batch = collate([(sample(0, [5, 6, 7, 8], [IGNORE_INDEX, 6, 7, 8]),), ()], facts.text)
    for rows in (batch, collate([()], facts.text)):
        checked.stage("lora").objective.build()(vlm, rows).loss_sum.backward()
        for name, value in vlm.named_parameters():
            assert (value.grad is not None) == (name in learning), name
            value.grad = None


def test_a_recipe_without_heads_is_refused(tmp_path: Path) -> None:
    made = tiny_recipe(tmp_path, tmp_path / "shards", align={"objective": {"kind": "multi_token"}})
    with pytest.raises(ValidationError, match=r"stages\.align\.objective: multi_token teaches the heads"):
        Recipe.model_validate(made)
