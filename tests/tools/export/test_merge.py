"""Merging and quantizing: the bundle is what was trained, whatever the parts, and what cannot be trusted is refused."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from models.bundle import read_manifest, verify
from models.common.errors import InputError, run_cli
from models.common.sharded import TensorFiles
from tests.support.backbones import hold_in_bf16, make_language
from tests.support.checkpoints import write_finished
from tests.support.paths import REPOSITORY
from tests.tools.conftest import beside, merge, run_of
from tools.export.merge import main as merge_main


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "tied", "projector", "precision", "base"),
    [
        ("llama", False, "mlp", "fp32", "fp32"),
        ("llama", True, "linear", "fp32", "fp32"),
        ("qwen2", True, "mlp", "fp32", "bf16"),
        ("qwen3", False, "linear", "fp32", "fp32"),
        ("llama", False, "mlp", "bf16", "bf16"),
        ("llama", True, "linear", "bf16", "fp32"),
        ("qwen2", True, "mlp", "bf16", "fp32"),
        ("qwen3", False, "linear", "bf16", "bf16"),
    ],
)
def test_merged_equals_the_model_with_adapters(
    tmp_path: Path, language: str, tied: bool, projector: str, precision: str, base: str
) -> None:
    """The language model's file is in the dtype `base`, the tower's in fp32."""
    recipe = run_of(tmp_path, language=language, tied=tied, projector=projector)
    if base == "bf16":
        hold_in_bf16(tmp_path / "language")
    recipe["stages"]["lora"]["engine"]["precision"] = precision
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle") == 0
    manifest = verify(tmp_path / "bundle")
    checks = {check.name: check for check in manifest.parity.checks}
    assert (manifest.precision, manifest.parity.passed) == (precision, True)
    assert checks["prompt ids differ"].value == 0.0
    assert checks["largest pixel difference"].value == 0.0
    if precision == "fp32":
        assert checks["largest relative logit difference"].value < 1e-5  # two orders of summation
        assert checks["share of same choices"].value == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapter_of_the_embedding_is_merged(tmp_path: Path, precision: str) -> None:
    recipe = run_of(tmp_path, language="llama", tied=False)
    recipe["stages"]["lora"]["engine"]["precision"] = precision
    recipe["stages"]["lora"]["tune"]["language"]["targets"] = ["embed_tokens", "q_proj"]
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle") == 0
    assert verify(tmp_path / "bundle").parity.passed
    name = "model.embed_tokens.weight"
    before = TensorFiles.open(tmp_path / "language").read(name)
    after = TensorFiles.open(tmp_path / "bundle").read(f"language_model.{name}")
    assert not torch.allclose(after[: len(before)].float(), before.float())


def test_a_recipe_json_that_says_otherwise_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = run_of(tmp_path)
    write_finished(recipe, "lora")
    recipe["stages"]["lora"]["tune"]["language"]["alpha"] = 32.0
    (Path(recipe["run"]) / "recipe.json").write_text(json.dumps(recipe))
    assert merge(recipe, tmp_path / "bundle") == 2
    message = capsys.readouterr().err
    assert "made with another tune.language.alpha (" in message
    assert "recipe.json must say how it was trained" in message


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "precision"), [(True, "fp32"), (False, "bf16")])
def test_a_full_fine_tune_is_what_was_trained(tmp_path: Path, tied: bool, precision: str) -> None:
    """Every weight of the language model comes from the checkpoint; tied, the head is its embedding's."""
    recipe = run_of(tmp_path, language="qwen2", tied=tied)
    stage = recipe["stages"]["lora"]
    stage["tune"]["language"] = {"kind": "full", "learning_rate": 1e-4}
    stage["engine"]["precision"] = precision
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle") == 0
    manifest = verify(tmp_path / "bundle")
    assert manifest.precision == precision
    files, base = TensorFiles.open(tmp_path / "bundle"), TensorFiles.open(tmp_path / "language")
    assert ("language_model.lm_head.weight" in files) != tied
    for name in base:
        if not (tied and name == "lm_head.weight"):
            value = base.read(name)
            assert not torch.equal(files.read(f"language_model.{name}")[: len(value)].float(), value.float()), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_trained_on_a_4_bit_base_are_merged_into_the_whole_one(tmp_path: Path, precision: str) -> None:
    recipe = run_of(tmp_path)
    recipe["stages"]["lora"]["engine"]["precision"] = precision
    recipe["model"]["language"]["load"] = "nf4"
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle") == 0
    assert verify(tmp_path / "bundle").precision == precision


@pytest.mark.slow
def test_stock_transformers_loads_every_tensor(trained_in_any: dict[str, Any]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, report = AutoModelForImageTextToText.from_pretrained(
        beside(trained_in_any, "bundle"), output_loading_info=True, dtype="auto"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    processor = AutoProcessor.from_pretrained(beside(trained_in_any, "bundle"))
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert model.config.image_token_id == image_token
    assert model.get_input_embeddings().weight.shape[0] > image_token


def test_the_image_tokens_row_is_never_the_greedy_choice(trained_in_any: dict[str, Any]) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(beside(trained_in_any, "bundle"), dtype="auto")
    logits = model.lm_head(torch.randn(256, model.config.text_config.hidden_size, dtype=model.dtype))
    assert not torch.any(logits.argmax(-1) == model.config.image_token_id)


@pytest.mark.slow
def test_untrained_exports_the_stage_as_it_would_start(trained: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(trained))
    words = [str(file), "--untrained", "--stage", "align", "--out", str(tmp_path / "before")]
    assert run_cli(merge_main, words) == 0
    assert read_manifest(tmp_path / "before").parents["checkpoint"] == "untrained"


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


def test_a_bundle_with_a_file_missing_changed_or_added_is_refused(trained: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(beside(trained, "bundle"), tmp_path / "bundle")
    for name in ("README.md", ".gitattributes", "adapter_config.json"):
        (tmp_path / "bundle" / name).write_text("{}")
    with pytest.raises(InputError, match=r"adapter_config\.json: not one of"):
        verify(tmp_path / "bundle")
    (tmp_path / "bundle" / "adapter_config.json").unlink()
    verify(tmp_path / "bundle")
    weights = tmp_path / "bundle" / "model.safetensors"
    contents = bytearray(weights.read_bytes())
    contents[-1] ^= 1
    weights.write_bytes(contents)
    with pytest.raises(InputError, match=r"model\.safetensors: changed"):
        verify(tmp_path / "bundle")
    weights.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: missing"):
        verify(tmp_path / "bundle")


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: the system then refuses as it does when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [1_000, 100_000])
def test_a_full_disk_leaves_nothing_and_is_named(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, num_bytes: int
) -> None:
    with files_up_to(num_bytes):
        assert merge(trained, tmp_path / "out") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"error: {tmp_path}")
    assert "File too large" in message
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_merge_leaves_no_half_and_the_next_one_goes_through(trained: dict[str, Any], tmp_path: Path) -> None:
    out, halfway = tmp_path / "out", tmp_path / ".out.tmp"
    command = [sys.executable, "-m", "tools.merge", trained["run"], str(out), "--stage", "lora"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    while not (halfway / "model.safetensors").exists():
        assert process.poll() is None, "it must not be done before it is killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not out.exists()
    assert merge(trained, out) == 0
    verify(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_run_a_checkpoint_and_out_by_name_are_the_same(trained: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = Path(trained["run"]) / "lora" / "checkpoints" / "step_000001"
    words = [["--out", str(tmp_path / "one"), trained["run"]], [str(checkpoint), str(tmp_path / "two")]]
    for line in words:
        assert run_cli(merge_main, [*line, "--probes", "1"]) == 0
    assert read_manifest(tmp_path / "one").files == read_manifest(tmp_path / "two").files


def test_streamed_forwards_are_those_of_whole_models(trained: dict[str, Any], tmp_path: Path) -> None:
    """The reference layer by layer against the model that training builds, with the checkpoint loaded into it."""
    from data_pipeline.templates import build_template
    from data_pipeline.tokens import Tokens
    from models.build import build_vlm, read_metadata
    from tools.export.golden import drawn
    from tools.export.parity import read_trained
    from tools.export.reference import Trained
    from trainer.checkpoint.initial_weights import load_weights
    from trainer.checkpoint.reader import CheckpointReader
    from trainer.config.recipe import load_recipe
    from trainer.engine.tuning import apply_plan

    recipe = load_recipe(Path(trained["run"]) / "recipe.json")
    config, reader = recipe.stage("lora"), CheckpointReader.open(Path(trained["run"]) / "lora/checkpoints/step_000001")
    facts = read_metadata(recipe.model, config.data.max_length)
    template = build_template(config.data.template, Tokens.of(facts.tokenizer))
    probe = drawn(1)
    found = read_trained(Trained.load(recipe.model, config, facts, reader, seed=0), template, probe)
    vlm = build_vlm(recipe.model, facts, frozen_dtype=torch.float32, seed=0)
    apply_plan(vlm, config.tune, seed=0)
    load_weights(vlm, reader)
    answer = facts.tokenizer(probe[0].answer, add_special_tokens=False)["input_ids"]
    ids_BL = torch.tensor([found.prompts[0] + answer])
    with torch.no_grad():
        inputs = vlm.eval().decoder_inputs(ids_BL, torch.cat(found.pixels))
        logits = vlm.language(**inputs, use_cache=False).logits[0]
    text = logits[ids_BL[0] != facts.text.image_token_id]
    assert torch.allclose(found.logits, text, atol=1e-5 * float(text.abs().max()))  # two attention kernels
