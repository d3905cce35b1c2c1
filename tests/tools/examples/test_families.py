"""Each family end to end in a few steps: every stage, killed and resumed, merged, opened, asked, scored, reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sightline
from models.common.errors import InputError, run_cli
from tests.support.backbones import tiny_recipe
from tests.support.benchmarks import make_benchmark
from tests.support.bundles import image
from tests.support.paths import REPOSITORY
from tests.support.qformer import qformer_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.training import train_all, weights
from tools.examples.families.__main__ import main as families_main
from tools.examples.families.report import write_report
from tools.examples.families.steps import TINY_CONFIGS, FamilySizes, plan, write_suite

Job = tuple[dict[str, Any], str, dict[str, Any]]
TRAINED = ("vicuna7b_clip_linear_tiny", "qwen05b_clip_mlp_tiny", "smollm_vit_qformer_tiny")


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """Random parts of each family's kind, three steps a stage."""
    shards = folder / "shards"
    linear, mlp, qformer = tiny_recipe(folder, shards), tiny_recipe(folder, shards), qformer_recipe(folder, shards)
    linear["model"]["projector"] = {"kind": "linear", "init_gain": 0.02}
    full = mlp["stages"].pop("lora")
    full["tune"]["language"] = {"kind": "full", "learning_rate": 1e-3}
    mlp["stages"]["full"] = full
    contrast = qformer["stages"]["contrast"]
    validation = {"data": contrast["data"], "every_steps": 3, "num_samples": 5}
    contrast["validation"] = {**validation, "metric": "validation/image_to_text/recall_at_1"}
    found = dict(zip(TRAINED, (linear, mlp, qformer), strict=True))
    for name, recipe in found.items():
        recipe["name"], recipe["run"] = name, str(folder / "run" / name)
        for stage in recipe["stages"].values():
            stage["duration"] = {"unit": "steps", "count": 3}
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three families' runs beside each other, the last stage of each killed after two steps and gone on with."""
    folder = tmp_path_factory.mktemp("families")
    write_set(folder / "shards", [6, 3])
    jobs: list[Job] = []
    for recipe in recipes(folder).values():
        *before, last = recipe["stages"]
        jobs += [(recipe, stage, {}) for stage in before]
        jobs += [(recipe, last, {"stop_after": 2}), (recipe, last, {})]
    run_on_ranks(1, train_all, jobs)
    return folder / "run"


@pytest.mark.slow
def test_every_family_is_trained_resumed_merged_asked_and_scored(run: Path) -> None:
    from eval.run import main as eval_main
    from tools.export.merge import main as merge_main

    (run / "shared" / "world").mkdir(parents=True)
    (run / "shared" / "world" / "held_out").mkdir()
    make_benchmark(run / "shared" / "world" / "held_out")
    configs = [config for config in TINY_CONFIGS if config.recipe in TRAINED]
    for config in configs:
        home = run / config.recipe
        assert run_cli(merge_main, [str(home), "--out", str(home / "bundle")]) == 0
        assert sightline.load(home / "bundle", device="cpu").chat(image(), "What is it?", max_new_tokens=3) is not None
        suite = write_suite(config, run, FamilySizes(num_scored=3))
        words = [str(home / "bundle"), "--suite", str(suite), "--out", str(home / "scores.json")]
        assert run_cli(eval_main, words) == 0
    report = write_report(configs, run, {f"train {TRAINED[0]}": 2.5, f"score {TRAINED[0]}": 1.0, "world": 9.0})
    assert json.loads((run / "report.json").read_text()) == report
    assert set(report) == set(TRAINED)
    for name, line in report.items():
        assert set(line) == {
            "vqa_accuracy",
            "vqa_accuracy_shuffled",
            "recall_at_1",
            "chance",
            "tokens_per_step",
            "seconds",
        }
        assert (line["chance"] is None) == (line["recall_at_1"] is None) == ("qformer" not in name)
    assert report["smollm_vit_qformer_tiny"]["chance"] == 1 / 5
    assert report[TRAINED[0]]["seconds"] == 3.5
    page = (run / "report.html").read_text()
    assert page.count("<figure>") == 9
    assert 'alt="similarities"' in page


@pytest.mark.slow
def test_the_contrast_s_weights_start_the_alignment_and_its_text_stays(run: Path) -> None:
    home = run / "smollm_vit_qformer_tiny"
    contrast, align = (weights({"run": str(home)}, stage) for stage in ("contrast", "align"))
    assert set(contrast) == set(align)
    text = {name for name in contrast if ".text." in name}
    assert "projector.text.words.weight" in text
    assert all(torch.equal(contrast[name], align[name]) for name in text)
    assert all(not torch.equal(contrast[name], align[name]) for name in set(contrast) - text)
    moved = [float((contrast[name] - align[name]).abs().max()) for name in ("projector.queries.weight",)]
    assert max(moved) < 0.1  # three steps away, not drawn anew


def test_the_plan_makes_shared_things_once_and_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    steps = plan(tmp_path, FamilySizes(), 0, [config.recipe for config in TINY_CONFIGS])
    names = [step.name for step in steps]
    assert len(names) == len(set(names))
    for number, step in enumerate(steps):
        assert set(step.needs) <= set(names[:number]), step.name
    assert {f"score {config.recipe}" for config in TINY_CONFIGS} <= set(names)
    one = [step.name for step in plan(tmp_path, FamilySizes(), 0, ["smollm_vit_qformer_tiny"])]
    assert "vit" in one
    assert "clip" not in one


def test_every_tiny_config_s_recipe_reads_what_the_plan_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    steps = plan(tmp_path, FamilySizes(), 0, [config.recipe for config in TINY_CONFIGS])
    made = {str(path) for step in steps for path in step.makes}
    for config in TINY_CONFIGS:
        text = (tmp_path / "recipes" / f"{config.recipe}.yaml").read_text()
        assert "runs/" not in "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        words = text.replace("{", " ").replace("}", " ").replace(",", " ").replace("[", " ").replace("]", " ").split()
        read = {word for word in words if word.startswith(f"{tmp_path}/shared/")}
        assert read
        for path in read:
            assert path in made or str(Path(path).parent) in made, path


def test_an_unknown_tiny_config_is_named() -> None:
    with pytest.raises(InputError, match="llava99: no such tiny config; there are vicuna7b_clip_linear_tiny"):
        families_main(["llava99"])
