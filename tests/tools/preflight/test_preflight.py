"""Preflight: every shipped recipe can be looked at without its weights; each fault is a line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from data_pipeline.index_build import build_index
from models.common.errors import InputError, run_cli
from tests.support.backbones import tiny_recipe, write_recipe
from tests.support.paths import REPOSITORY
from tests.support.shards import caption_sample, write_set, write_tar
from tools.preflight import stage as preflight_stage
from tools.preflight.__main__ import main, parse_bytes
from tools.preflight.report import Report

ADAPTERS = {"kind": "lora", "learning_rate": 1e-4, "rank": 2, "alpha": 4}
SHIPPED = sorted(file.stem for file in (REPOSITORY / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("preflight")
    write_set(folder / "shards", [5, 1, 9], words=20)
    return tiny_recipe(folder, folder / "shards")


def run(recipe: dict[str, Any], folder: Path, *words: str) -> int:
    file = write_recipe(folder / "recipe.yaml", recipe)
    return run_cli(main, [str(file), "--run", str(folder / "run"), *words])


@pytest.mark.parametrize("stem", SHIPPED)
def test_every_shipped_recipe_can_be_looked_at_without_its_weights(
    stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # neither data nor weights lie here
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert run_cli(main, [str(REPOSITORY / "recipes" / f"{stem}.yaml"), "--gpus", "8"]) == 1
    said = capsys.readouterr().out
    faults = said.partition("\nfaults\n")[2].splitlines()
    assert any("no shard set" in fault for fault in faults)
    if stem == "vicuna7b_clip_linear":
        assert "4,198,400 (4.2M)" in said
        assert "39,976,960 (40.0M)" in said  # rank 16 on every linear of a 7B
        assert "6,738,415,616" in said
        assert "activation_checkpointing: false" in said
    if ("vicuna7b" in stem or "qwen" in stem) and not stem.endswith("_tiny"):
        assert "together" in said
        assert "the parts' files are not on this machine" in said


@pytest.mark.slow
@pytest.mark.parametrize("num_gpus", [8, 64])
@pytest.mark.parametrize("tuned", ["align", "lora", "full"])
def test_a_7b_without_data_has_memory_wire_and_hours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tuned: str, num_gpus: int
) -> None:
    file = REPOSITORY / "recipes" / "llava15_vicuna7b.yaml"
    full = ["stages.lora.tune.language={kind: full, learning_rate: 2e-5}", "stages.lora.engine.zero=zero3"]
    words = ["--stage", "align" if tuned == "align" else "lora", "--gpus", str(num_gpus), "--gpu-memory", "80GB"]
    run_cli(main, [str(file), "--run", str(tmp_path / "run"), *words, *(full if tuned == "full" else [])])
    said = capsys.readouterr().out
    assert re.search(r"together +[\d.]+ GB +[\d.]+ GB\n", said)
    assert re.search(r"a step: [\d.]+ s, computed from .* 100,000 samples: [\d.]+ hours \(assumed", said)
    assert re.search(
        r"over the wire, a GPU and step: [\d.]+ [MG]B gathered, [\d.]+ [MG]B reduced, .*; [\d.]+ hours", said
    )
    assert "steps: they follow from the data, which are not here" in said


def test_a_sound_recipe_has_nothing_in_its_way(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe, tmp_path, "--gpus", "2", "--gpu-memory", "8GiB") == 0
    said = capsys.readouterr().out
    for words in (
        "nothing stands in the way",
        "15 samples in 3 shards; 3 to 4 a row",
        "15 of 15 samples encode",
        "image tokens are as many as features: 16 a tile",
        "in a real forward of 4 samples",
        "6 steps; 0.0 hours, computed from",
        "an assumed 35% of 2 x 989 TFLOP/s",
    ):
        assert words in said
    assert 'class="learnt"' in (tmp_path / "run" / "preflight" / "lora.html").read_text()


def test_a_gpu_holds_no_more_rows_than_it_has(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 4 rows two GPUs take two each at once, and four take one, whatever `micro_rows` allows."""
    tokens = {}
    for num_gpus in (2, 4):
        run(recipe, tmp_path, "--gpus", str(num_gpus), "--stage", "align")
        found = re.search(r"micro-batch of ([\d,]+) tokens", capsys.readouterr().out)
        assert found is not None
        tokens[num_gpus] = int(found[1].replace(",", ""))
    assert tokens[2] == 2 * tokens[4]


@pytest.mark.parametrize(
    ("changes", "words", "named"),
    [
        ({}, ["--gpus", "5"], "4 rows for 5 GPUs"),
        ({"batch": {"global_rows": 16, "micro_rows": 2}}, [], "1 of 16 rows of the global batch have no sample"),
        ({}, ["--gpu-memory", "1GB"], "a GPU has 1.00 GB: lower stages.align.batch.micro_rows"),
        ({}, ["stages.align.data.max_length=20"], "15 of 15 samples cannot be used, the first: shard-"),
        ({}, ["stages.align.data.max_length=9999"], "9999 is more than the 512 positions"),
        ({}, ["stages.align.data.sources.0.path=nodata"], "no shard set at nodata"),
        ({}, ["model.language.path=owner/unheard-of"], "its shapes are not known here"),
        ({}, ["model.projector={kind: pixel_shuffle, factor: 3}"], "16 features are no grid of 3 x 3 squares"),
        ({}, ["model.vision.feature_layer=-9"], "feature_layer: -9, but the encoder has 2 layers: -3"),
        ({}, ["model.image={kind: anyres, pinpoints: [[48, 96], [50, 96]]}"], "[50, 96] is not a multiple of"),
        (
            {
                "tune": {
                    "language": {"kind": "lora", "learning_rate": 1e-4, "rank": 2, "alpha": 4, "targets": ["q_prj"]}
                }
            },
            [],
            "q_prj names no layer that can be adapted; did you mean q_proj?",
        ),
        (
            {"tune": {"projector": {"kind": "full", "learning_rate": 1e-4, "frozen": ["linear_3"]}}},
            [],
            "tune.projector: linear_3 names no module of it; did you mean linear_",
        ),
    ],
)
def test_each_fault_is_a_line_and_an_exit_code(
    recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: list[str],
    named: str,
) -> None:
    varied = json.loads(json.dumps(recipe))
    varied["stages"]["align"] |= changes
    assert run(varied, tmp_path, "--stage", "align", *words) == 1
    faults = capsys.readouterr().out.partition("\nfaults\n")[2].splitlines()
    assert any(named in fault for fault in faults), faults


def test_a_part_that_no_sample_reaches_is_a_fault(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    samples = [(f"{number:06d}", caption_sample(number, image=False)) for number in range(8)]
    write_tar(tmp_path / "texts" / "shard-000000.tar", samples)
    build_index(tmp_path / "texts")
    words = ["--stage", "align", f"stages.align.data.sources.0.path={tmp_path / 'texts'}"]
    assert run(recipe, tmp_path, *words) == 1
    assert "none of 8 samples has an image, so projector would learn nothing" in capsys.readouterr().out


def test_what_was_not_checked_is_not_called_fine(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    assert report.close() == 0
    assert "nothing stands in the way" in capsys.readouterr().out
    report.leave_out("align: hours: the peak is not known")
    assert report.close() == 0
    said = capsys.readouterr().out
    assert "nothing stands in the way" not in said
    assert "no fault in what was checked; 1 of the checks could not be made here" in said


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_a_fault(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    language = Path(shutil.copytree(recipe["model"]["language"]["path"], tmp_path / "language"))
    tokenizer = AutoTokenizer.from_pretrained(language)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<point>", "<end_of_points>"])
    tokenizer.save_pretrained(language)
    assert run(recipe, tmp_path, "--stage", "align", f"model.language.path={language}") == 1
    said = capsys.readouterr().out.partition("\nfaults\n")[2]
    assert f"2 of the tokenizer's {rows + 3} tokens (<point>, <end_of_points>) have no row" in said
    assert f"in the embedding, which has {rows};" in said


@pytest.mark.parametrize("part", ["vision", "language"])
def test_parts_without_weights_or_in_another_format_are_a_fault(
    recipe: dict[str, Any], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(recipe["model"][part]["path"], tmp_path / part))
    (folder / "model.safetensors").unlink()
    words = ["--stage", "align", f"model.{part}.path={folder}"]
    assert run(recipe, tmp_path, *words) == 1
    assert f"{folder}: no weights in it" in capsys.readouterr().out.partition("\nfaults\n")[2]
    (folder / "model.gguf").write_bytes(b"")
    assert run(recipe, tmp_path, *words) == 1
    said = capsys.readouterr().out.partition("\nfaults\n")[2]
    assert (
        f"weights as GGUF; make a directory of them that can be trained: sightline convert {folder}/model.gguf" in said
    )


def test_image_tokens_that_nothing_compared_are_not_called_fitting(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = "model.image={kind: anyres, pinpoints: [[48, 96], [96, 48]]}"
    assert run(recipe, tmp_path, "--stage", "align", tiles, "--gpu-memory", "8GiB") == 0
    assert "in a real forward of 4 samples" in capsys.readouterr().out
    monkeypatch.setattr(preflight_stage, "SMALL_PARAMETERS", 0)
    assert run(recipe, tmp_path, "--stage", "align", tiles, "--gpu-memory", "8GiB") == 0
    said = capsys.readouterr().out
    assert "align: image tokens against features: a forward, made up to 0" in said
    assert "nothing stands in the way" not in said
    assert "image tokens are as many" not in said
    (tmp_path / "texts").mkdir()
    write_tar(
        tmp_path / "texts" / "shard-000000.tar",
        [(f"{number:06d}", caption_sample(number, image=False)) for number in range(8)],
    )
    build_index(tmp_path / "texts")
    run(recipe, tmp_path, "--stage", "lora", f"stages.lora.data.sources.0.path={tmp_path / 'texts'}")
    assert "image tokens are as many" not in capsys.readouterr().out


def test_a_size_that_config_and_preprocessor_dispute_is_a_fault(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(recipe["model"]["vision"]["path"], tmp_path / "vision"))
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "crop_size": {"height": 36, "width": 36}}))
    words = ["--stage", "align", f"model.vision.path={folder}"]
    assert run(recipe, tmp_path, *words) == 1
    said = capsys.readouterr().out.partition("\nfaults\n")[2]
    assert "config.json says 48 pixels, preprocessor_config.json says 36" in said
    assert run(recipe, tmp_path, *words, "model.vision.image_size=48") == 0
    assert "nothing stands in the way" in capsys.readouterr().out
    assert run(recipe, tmp_path, *words, "model.vision.image_size=36") == 1
    assert "image_size: 36, but" in capsys.readouterr().out.partition("\nfaults\n")[2]


def test_checkpoints_that_do_not_fit_are_a_fault(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=100_000))
    assert run(recipe, tmp_path, "--stage", "align") == 1
    assert "do not fit into 0.10 MB" in capsys.readouterr().out.partition("\nfaults\n")[2]


def test_sizes_are_read_with_their_units() -> None:
    assert (parse_bytes("80GB"), parse_bytes("24 GiB"), parse_bytes("16")) == (80e9, 24 * 2**30, 16e9)
    with pytest.raises(InputError, match="80GB or 24GiB"):
        parse_bytes("lots")
