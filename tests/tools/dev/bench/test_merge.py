"""The benchmarks of merging and decoding on something tiny: what they draw is what the commands take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.common.errors import run_cli
from models.common.sharded import TensorFiles
from tests.tools.conftest import beside
from tools.dev.bench import decode, large, merge
from tools.export.merge import main as merge_main


@pytest.mark.parametrize("stage", merge.STAGES)
def test_a_drawn_checkpoint_merges_to_its_shapes(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"WIDTH": 6, "INNER": 10, "VOCABULARY": 11}.items():
        monkeypatch.setattr(merge, name, size)
    shapes = merge.shapes_of(2)
    merge.draw(tmp_path / "checkpoint", shapes, stage)
    assert run_cli(merge_main, [str(tmp_path / "checkpoint"), str(tmp_path / "out")]) == 0
    files = TensorFiles.open(tmp_path / "out")
    assert {name: files.stored(name).shape for name in files} == shapes
    drawn = [torch.load(file)["optimizer_state_dict"] for file in sorted((tmp_path / "checkpoint").rglob("*optim*"))]
    flat = torch.cat([next(value[0] for value in each.values() if isinstance(value, list)) for each in drawn])
    assert torch.equal(files.read("model.embed_tokens.weight").flatten()[:33], flat[:33])
    merge.check_equal(tmp_path / "out", tmp_path / "out")


def test_the_large_run_is_one_that_merge_takes(tmp_path: Path) -> None:
    from trainer.config.recipe import Recipe

    recipe = Recipe.model_validate_json(json.dumps(large._recipe(tmp_path)))
    assert recipe.stage("lora").engine.precision == "bf16"
    total = sum(torch.Size(shape).numel() for shape in large.shapes_of(32).values())
    assert total * 2 == pytest.approx(13.5e9, rel=0.01)


def test_decoding_is_measured_beside_generate(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(beside(trained, "bundle").resolve()), "--device", "cpu", "--tokens", "8", "--rounds", "1"]
    assert run_cli(decode.main, words) == 0
    assert "ms a token" in capsys.readouterr().out
    rows = json.loads((tmp_path / "runs/bench/decode.json").read_text())
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)
