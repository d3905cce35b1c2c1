"""What a stage starts from computes what the stage before it ended with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.backbones import tiny_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.training import train, vary
from trainer.config.recipe import Recipe
from trainer.distributed.context import DistributedContext

FULL = {"kind": "full", "learning_rate": 3e-2}
DORA = {"kind": "lora", "learning_rate": 1e-2, "rank": 4, "alpha": 8, "dora": True}


def magnitudes(ranks: DistributedContext, recipe: dict[str, Any]) -> list[tuple[list[float], list[float], bool]]:
    """Of each adapted matrix, after a stage that trains it whole: DoRA's magnitudes, its rows' lengths, whether the
    magnitudes are in a group of what learns."""
    from trainer.inputs import read_inputs
    from trainer.starting_model import starting_model

    train(ranks, recipe, "align")
    inputs = read_inputs(Recipe.model_validate_json(json.dumps(recipe)), "lora", ranks)
    inputs.stream.close()
    vlm, groups, _ = starting_model(inputs.recipe, "lora", inputs.metadata, inputs.init)
    learning = {id(parameter) for group in groups for parameter in group.parameters}
    found = []
    for layer in vlm.language.modules():
        if hasattr(layer, "lora_magnitude_vector"):
            magnitude = layer.lora_magnitude_vector["default"].weight
            lengths = torch.linalg.vector_norm(layer.get_base_layer().weight.float(), dim=1)
            found.append((magnitude.tolist(), lengths.tolist(), id(magnitude) in learning))
    return found


@pytest.mark.slow
def test_dora_begins_at_the_lengths_of_the_stage_before(tmp_path: Path) -> None:
    """As the adapter is new, those of the pretrained matrices would undo what the stage before has learnt."""
    write_set(tmp_path / "shards", [5, 1, 9])
    recipe = vary(
        tiny_recipe(tmp_path, tmp_path / "shards"), "chain", "align", tune={"projector": FULL, "language": FULL}
    )
    recipe = vary(recipe, "chain", "lora", tune={"projector": FULL, "language": DORA})
    (found,) = run_on_ranks(1, magnitudes, recipe)
    assert found
    for magnitude, lengths, is_learning in found:
        assert magnitude == pytest.approx(lengths, rel=1e-5)
        assert is_learning
