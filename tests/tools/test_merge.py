"""Merging and quantizing: the bundle is what was trained, whatever the parts, and what cannot be trusted is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models.bundle import read_manifest, verify
from models.errors import InputError, run_cli
from tests.support.backbones import make_clip, make_language, tiny_recipe
from tests.support.checkpoints import write_finished
from tools.merge import main as merge_main
from tools.quantize import main as quantize_main


def run_of(folder: Path, *, language: str = "llama", tied: bool = False, projector: str = "mlp") -> dict[str, Any]:
    make_clip(folder / "vision")
    make_language(folder / "language", language, tied=tied)
    recipe = tiny_recipe(folder, folder / "shards")
    recipe["model"]["projector"] = {"kind": projector}
    recipe["stages"]["lora"]["init"] = None
    return recipe


def merge(recipe: dict[str, Any], out: Path, *words: str) -> int:
    return run_cli(merge_main, [recipe["run"], "--stage", "lora", "--out", str(out), *words])


@pytest.mark.parametrize(
    ("language", "tied", "projector"),
    [("llama", False, "mlp"), ("llama", True, "linear"), ("qwen2", True, "mlp"), ("qwen3", False, "linear")],
)
def test_merged_equals_the_model_with_adapters(tmp_path: Path, language: str, tied: bool, projector: str) -> None:
    recipe = run_of(tmp_path, language=language, tied=tied, projector=projector)
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle") == 0
    manifest = verify(tmp_path / "bundle")
    checks = {check.name: check for check in manifest.parity.checks}
    assert manifest.parity.passed
    assert checks["largest relative logit difference"].value < 1e-5  # fp32: two orders of summation
    assert checks["share of same choices"].value == 1.0
    assert checks["prompt ids differ"].value == 0.0
    assert checks["largest pixel difference"].value == 0.0


def test_adapters_trained_on_a_4_bit_base_are_merged_into_the_whole_one(tmp_path: Path) -> None:
    recipe = run_of(tmp_path)
    recipe["model"]["language"]["load"] = "nf4"
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle") == 0
    assert verify(tmp_path / "bundle").precision == "fp32"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("merge")
    recipe = run_of(folder)
    write_finished(recipe, "lora")
    assert merge(recipe, folder / "bundle") == 0
    return recipe


def beside(recipe: dict[str, Any], name: str) -> Path:
    return Path(recipe["run"]).parent / name


def test_stock_transformers_loads_every_tensor(trained: dict[str, Any]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, report = AutoModelForImageTextToText.from_pretrained(
        beside(trained, "bundle"), output_loading_info=True, dtype="auto"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    processor = AutoProcessor.from_pretrained(beside(trained, "bundle"))
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert model.config.image_token_id == image_token
    assert model.get_input_embeddings().weight.shape[0] > image_token


def test_the_image_tokens_row_is_never_the_greedy_choice(trained: dict[str, Any]) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(beside(trained, "bundle"), dtype="auto")
    logits = model.lm_head(torch.randn(256, model.config.text_config.hidden_size))
    assert not torch.any(logits.argmax(-1) == model.config.image_token_id)


def test_untrained_exports_the_stage_as_it_would_start(trained: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(trained))
    words = [str(file), "--untrained", "--stage", "align", "--out", str(tmp_path / "before")]
    assert run_cli(merge_main, words) == 0
    assert read_manifest(tmp_path / "before").parents["checkpoint"] == "untrained"


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_quantizing_keeps_vision_projector_and_head_whole(
    trained: dict[str, Any], tmp_path: Path, precision: str
) -> None:
    from transformers import AutoModelForImageTextToText

    words = [str(beside(trained, "bundle")), "--to", precision, "--out", str(tmp_path / "small"), "--force"]
    assert run_cli(quantize_main, words) == 0
    manifest = verify(tmp_path / "small")
    assert manifest.precision == precision
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "small", device_map="cpu")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    quantized = {name for name, kind in kinds.items() if kind in ("Linear4bit", "Linear8bitLt")}
    assert len(quantized) == 14
    assert all(".language_model." in name for name in quantized)
    assert run_cli(quantize_main, [str(tmp_path / "small"), "--out", str(tmp_path / "again")]) == 2


def test_another_base_is_refused_by_name(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    language = beside(trained, "language")
    shutil.copytree(language, tmp_path / "kept")
    try:
        make_language(language, seed=5)
        assert merge(trained, tmp_path / "out") == 2
        message = capsys.readouterr().err
        assert str(language) in message
        assert "not the language weights" in message
        assert not (tmp_path / "out").exists()
    finally:
        shutil.rmtree(language)
        shutil.copytree(tmp_path / "kept", language)


def test_a_missing_rank_file_is_refused_by_name(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = dict(trained, run=str(tmp_path / "run"))
    shutil.copytree(trained["run"], recipe["run"])
    next(Path(recipe["run"]).rglob("rank_*.safetensors")).unlink()
    (Path(recipe["run"]) / "recipe.json").write_text(json.dumps(recipe))
    assert merge(recipe, tmp_path / "out") == 2
    assert "rank_00000_of_00001.safetensors is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere", "--stage", "lora"], "nowhere: no recipe.json"),
        (["RUN", "--stage", "sft"], "it has align, lora"),
        (["RUN", "--stage", "align"], "not finished"),
        (["RUN", "--stage", "lora", "--step", "7"], "there are step_000001"),
    ],
)
def test_wrong_words_get_one_line(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], named: str
) -> None:
    words = [trained["run"] if word == "RUN" else word for word in words]
    assert run_cli(merge_main, [*words, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert named in message
    assert not any(tmp_path.iterdir())


def test_a_bundle_with_a_file_missing_or_changed_is_refused(trained: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(beside(trained, "bundle"), tmp_path / "bundle")
    weights = tmp_path / "bundle" / "model.safetensors"
    contents = bytearray(weights.read_bytes())
    contents[-1] ^= 1
    weights.write_bytes(contents)
    with pytest.raises(InputError, match=r"model\.safetensors: changed"):
        verify(tmp_path / "bundle")
    weights.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: missing"):
        verify(tmp_path / "bundle")
