"""What a stage says of its inputs before it begins: a size that two files dispute is a warning, said once."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from models.common.errors import InputError
from tests.support.backbones import tiny_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.training import train, vary
from trainer.config.recipe import Recipe
from trainer.config.schema import EngineConfig
from trainer.distributed.context import DistributedContext
from trainer.inputs import check_compile, read_inputs


def test_a_disputed_size_is_a_warning_of_the_first_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_set(tmp_path / "shards", [5])
    values = tiny_recipe(tmp_path, tmp_path / "shards")
    file = tmp_path / "vision" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "crop_size": {"height": 36, "width": 36}}))
    said = []
    for size, rank in ((None, 0), (None, 1), (48, 0)):
        values["model"]["vision"]["image_size"] = size
        recipe = Recipe.model_validate_json(json.dumps(values))
        with caplog.at_level(logging.WARNING):
            inputs = read_inputs(recipe, "align", DistributedContext(rank=rank, world_size=2))
        assert inputs.metadata.image.size == 48  # what config.json says, as before
        said.append([record.message for record in caplog.records if "image_size" in record.message])
        caplog.clear()
    assert [len(lines) for lines in said] == [1, 0, 0]
    assert "config.json says 48 pixels, preprocessor_config.json says 36" in said[0][0]


def test_compiled_layers_under_zero3_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_set(tmp_path / "shards", [5])
    values = tiny_recipe(tmp_path, tmp_path / "shards")
    for zero in ("zero3", "zero3_offload"):
        values["stages"]["align"]["engine"] |= {"zero": zero, "compile": True}
        recipe = Recipe.model_validate_json(json.dumps(values))
        with pytest.raises(InputError, match=rf"stages\.align\.engine\.compile: under {zero} .* set compile=false"):
            read_inputs(recipe, "align", DistributedContext())
    check_compile(recipe.stage("align").model_copy(update={"engine": EngineConfig(compile=True)}), "")


@pytest.mark.slow
def test_fp16_for_a_model_born_in_bf16_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "shards", [5])
    recipe = tiny_recipe(tmp_path, tmp_path / "shards")
    file = Path(recipe["model"]["language"]["path"]) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "bfloat16"}))
    varied = vary(recipe, "refused", "align", engine__precision="fp16")
    with pytest.raises(InputError, match=r"engine\.precision=fp16: .* was trained in bf16"):
        run_on_ranks(1, train, varied, "align")  # a process of its own: it has joined a process group by then
