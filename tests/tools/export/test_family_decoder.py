"""The decoder from scratch with heads for future tokens, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.backbones import tiny_recipe
from tests.support.families import answer_and_score, merge_and_open, train_and_resume
from tests.support.shards import write_set
from tests.support.training import losses, weights


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
