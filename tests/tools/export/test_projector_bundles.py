"""Bundles of projectors that Llava has no place for: our class, opened by transformers, equal to training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sightline
from models.bundle import verify
from models.common.errors import run_cli
from tests.support.bundles import image
from tests.support.checkpoints import write_finished
from tests.support.paths import REPOSITORY
from tests.support.qformer import NUM_QUERIES, qformer_recipe
from tests.tools.conftest import merge, run_of
from tools.export.merge import main as merge_main
from tools.export.parity import LOGIT_BOUNDS
from tools.export.quantize import main as quantize_main

PROJECTORS: dict[str, dict[str, Any]] = {
    "perceiver": {"kind": "perceiver", "num_queries": 5, "num_layers": 2, "num_heads": 4},
    "pixel_shuffle": {"kind": "pixel_shuffle", "factor": 2},
}


def q_former(folder: Path) -> dict[str, Any]:
    recipe = qformer_recipe(folder, folder / "shards")
    recipe["stages"]["lora"]["init"] = None
    return recipe


def other(folder: Path, kind: str) -> dict[str, Any]:
    recipe = run_of(folder)
    recipe["model"]["projector"] = PROJECTORS[kind]
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qformer", *PROJECTORS])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bundle_equals_the_trained_model(tmp_path: Path, kind: str, precision: str) -> None:
    recipe = q_former(tmp_path) if kind == "qformer" else other(tmp_path, kind)
    recipe["stages"]["lora"]["engine"]["precision"] = precision
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle") == 0
    checks = {check.name: check.value for check in verify(tmp_path / "bundle").parity.checks}
    assert checks["largest relative logit difference"] < {"fp32": 1e-5, "bf16": LOGIT_BOUNDS["bf16"]}[precision]
    assert checks["prompt ids differ"] == 0.0
    model = sightline.load(tmp_path / "bundle", device="cpu")
    assert type(model.model).__name__ == "SightlineForConditionalGeneration"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {parameter.dtype for parameter in model.model.parameters()} == {dtype}
    assert model.chat(image(), "What is it?", max_new_tokens=4)
    turns = (sightline.Turn("user", "What is it?"),)
    seen = model.loss(
        [sightline.Query((image(shape),), turns) for shape in ("circle", "square")], ["A red circle."] * 2
    )
    assert abs(seen[0][0] - seen[1][0]) > 1e-5
    if kind == "perceiver":
        words = [str(tmp_path / "bundle"), str(tmp_path / "small"), "--calibrate", "--probes", "2", "--force"]
        assert run_cli(quantize_main, words) == 0
        assert sightline.load(tmp_path / "small", device="cpu").chat(image(), "What?", max_new_tokens=4) is not None
    if kind == "qformer":
        written = json.loads((tmp_path / "bundle" / "config.json").read_text())
        assert written["image_seq_length"] == NUM_QUERIES
        assert not any(".text." in name for name, _ in model.model.named_parameters())
        assert (
            run_cli(quantize_main, [str(tmp_path / "bundle"), str(tmp_path / "small"), "--to", "nf4", "--force"]) == 0
        )
        assert sightline.load(tmp_path / "small", device="cpu").chat(image(), "What?", max_new_tokens=4) is not None
        _opens_after_register(tmp_path / "bundle")


def _opens_after_register(bundle: Path) -> None:
    code = (
        "import sys, sightline; assert 'torch' not in sys.modules; sightline.register();"
        "from transformers import AutoModelForImageTextToText as Auto;"
        f"model, report = Auto.from_pretrained({str(bundle)!r}, output_loading_info=True);"
        "print(type(model).__name__, len(report['missing_keys']), len(report['unexpected_keys']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "SightlineForConditionalGeneration 0 0", done.stderr[-2000:]


def test_a_stage_without_a_language_model_has_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(q_former(tmp_path)))
    words = [str(file), "--untrained", "--stage", "contrast", "--out", str(tmp_path / "out")]
    assert run_cli(merge_main, words) == 2
    assert "contrast: it trains no language model, so nothing could answer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
