"""Memory that ran out is wrong input: what to lower, and what preflight had computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.common.errors import InputError
from tests.support.backbones import tiny_recipe
from tests.support.shards import write_set
from tools.preflight.__main__ import main as preflight
from trainer.config.recipe import Recipe
from trainer.distributed.context import DistributedContext
from trainer.out_of_memory import explained, layers_to_recompute, preflight_file

ALONE, RANKS = DistributedContext(), DistributedContext(rank=1, world_size=2)
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nmore")


def recipe_in(folder: Path, **engine: Any) -> Recipe:
    values = tiny_recipe(folder, folder / "shards")
    values["stages"]["align"]["engine"] |= engine
    return Recipe.model_validate(values, strict=False)


def test_it_names_the_rows_the_layers_and_what_preflight_had_said(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    rows = recipe.stage("align").batch.micro_rows
    error = explained(CUDA, recipe, "align", RANKS)
    assert isinstance(error, InputError)
    assert error.__cause__ is CUDA
    told = str(error)
    assert "\n" not in told
    assert told.startswith("rank 1 (")
    assert "ran out of memory: CUDA out of memory. Tried to allocate 2.00 GiB." in told
    assert f"stages.align.batch.micro_rows={rows // 2} (a rank takes {rows} rows at once)" in told
    assert "stages.align.engine.activation_checkpointing=true" in told
    assert "preflight has computed nothing for this run" in told
    file = preflight_file(Path(recipe.run), "align")
    file.parent.mkdir(parents=True)
    found = {
        "zero": "zero2", "micro_rows": rows, "num_gpus": 8, "gpu_bytes": 80e9, "num_recomputed": 0,
        "bytes_by_recomputed": [79e9, 76e9, 73e9, 70e9],
    }  # fmt: skip
    file.write_text(json.dumps(found))
    told = str(explained(CUDA, recipe, "align", RANKS))
    assert f"preflight had computed 79.0 GB of 80.0 GB for micro_rows={rows} and 0 recomputed layers on 8 GPUs" in told
    assert "activation_checkpointing=2 (layers to recompute; it is 0)" in told


def test_layers_follow_from_preflights_numbers_corrected_by_how_far_they_were_off() -> None:
    found: dict[str, object] = {"gpu_bytes": 80e9, "bytes_by_recomputed": [40e9, 39e9, 37e9, 30e9]}
    assert layers_to_recompute(0, found) == 2  # 37 GB stand for 74: below 95 % of 80
    assert layers_to_recompute(2, found) == 3
    assert layers_to_recompute(3, found) == 0
    assert layers_to_recompute(True, found) == 0
    assert layers_to_recompute(0, {}) == 0


def test_rows_that_a_rank_does_not_have_are_not_halved(tmp_path: Path) -> None:
    """Of 4 rows each of 4 ranks has one, whatever `micro_rows` allows."""
    told = str(explained(CUDA, recipe_in(tmp_path), "align", DistributedContext(world_size=4)))
    assert "micro_rows=" not in told
    assert "stages.align.engine.activation_checkpointing=true" in told


def test_where_nothing_is_left_to_lower_it_names_the_division(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, activation_checkpointing=True)
    stage = recipe.stage("align")
    batch = stage.batch.model_copy(update={"micro_rows": 1})
    recipe.stages["align"] = stage.model_copy(update={"batch": batch})
    assert "engine.zero=zero3" in str(explained(MemoryError(), recipe, "align", ALONE))


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert explained(error, recipe_in(tmp_path), "align", ALONE) is error


@pytest.mark.slow
def test_preflight_leaves_its_numbers_where_a_run_looks_for_them(tmp_path: Path) -> None:
    write_set(tmp_path / "shards", [5])
    values = tiny_recipe(tmp_path, tmp_path / "shards")
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    preflight([str(tmp_path / "recipe.yaml"), "--stage", "align", "--gpus", "2", "--samples", "2"])
    found = json.loads(preflight_file(Path(values["run"]), "align").read_text())
    assert found["num_gpus"] == 2
    assert found["bytes_by_recomputed"][found["num_recomputed"]] > 0
    assert "preflight had computed" in str(explained(CUDA, recipe_in(tmp_path), "align", ALONE))
