"""A stage with kept features is the stage without, bit for bit; where it could not be, it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.common.errors import InputError
from tests.support.backbones import tiny_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.training import losses, train_all, vary, weights
from trainer.config.recipe import Recipe
from trainer.inputs import check_kept_features

FULL = {"kind": "full", "learning_rate": 1e-4}


def kept(recipe: dict[str, Any], run: str, stage: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """A copy of a recipe that keeps features in `folder`."""
    varied = vary(recipe, run, stage, **changes)
    varied["model"]["vision"]["keep_features"] = {"path": str(folder)}
    return varied


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_with_kept_features_is_training_without(tmp_path: Path, precision: str) -> None:
    """Two ranks that write at once, epochs that mix the pictures anew, then a run that reads and one over damage."""
    write_set(tmp_path / "shards", [5, 3])
    changes = {"engine__precision": precision, "validation": None}
    recipe = tiny_recipe(tmp_path, tmp_path / "shards")
    folder = tmp_path / "features"
    without = vary(recipe, "without", "align", **changes)
    runs = [kept(recipe, name, "align", folder, **changes) for name in ("cold", "warm")]
    run_on_ranks(2, train_all, [(without, "align", {}), *((run, "align", {}) for run in runs)])
    entries = sorted(folder.glob("??/*"))
    assert len(entries) >= 8  # and those of the first gradient in two precisions, over fewer rows
    for entry in entries[::2]:
        entry.write_bytes(entry.read_bytes()[::-1])
    runs.append(kept(recipe, "damaged", "align", folder, **changes))
    run_on_ranks(2, train_all, [(runs[-1], "align", {})])
    expected = weights(without, "align")
    for run in runs:
        assert losses(run, "align") == losses(without, "align")
        assert all(torch.equal(value, expected[name]) for name, value in weights(run, "align").items())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tune__vision": FULL}, "tune.vision: the encoder learns"),
        ({"data__augment": {"flip": 0.5, "kind": "picture"}}, "data.augment: a picture is drawn anew"),
        ({"engine__zero": "zero3"}, "engine.zero: under ZeRO-3"),
    ],
)
def test_it_is_refused_where_it_could_not_be_exact(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path / "shards")
    with pytest.raises(InputError, match=named):
        check_kept_features(_recipe(kept(recipe, "run", "align", tmp_path, **changes)), "align")
    check_kept_features(_recipe(kept(recipe, "run", "align", tmp_path)), "align")
    check_kept_features(_recipe(vary(recipe, "run", "align", **changes)), "align")


def _recipe(values: dict[str, Any]) -> Recipe:
    return Recipe.model_validate_json(json.dumps(values))
