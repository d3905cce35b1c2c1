"""Each step of `make photos` is a command that its parser takes, after what it needs; how long is said beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.run import suite_configs
from models.common.errors import run_cli
from models.common.files import append_line, write_json
from tests.support.paths import REPOSITORY
from tools.convert.__main__ import _parser as convert_parser
from tools.examples.photos import __main__ as command
from tools.examples.photos.forecast import Forecast, precision_of, read_forecast
from tools.examples.photos.steps import (
    IMAGE_SIZE,
    RECIPE,
    Photos,
    PhotosSizes,
    plan,
    recipe_arguments,
    rehearsal,
    suite,
)
from trainer.config.recipe import load_recipe


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Photos:
    monkeypatch.chdir(REPOSITORY)
    return Photos(tmp_path / "data", tmp_path / "run", 3, "fp32", PhotosSizes(num_held_out=20))


def test_every_step_comes_after_what_it_needs_and_writes_below_the_run(photos: Photos) -> None:
    steps = plan(photos)
    before: set[str] = set()
    for step in steps:
        assert set(step.needs) <= before
        assert all(path.is_relative_to(photos.run) for path in step.makes)
        before.add(step.name)
    assert steps[-1].name == "report"
    assert steps[: len(rehearsal(photos))] == rehearsal(photos)
    wholes = [step for step in steps if step.cores == 2]
    assert [step.name for step in wholes] == ["rehearsal", "align", "lora"]
    assert "tools.examples.photos.killed_once" in wholes[-1].command


def test_the_recipe_is_this_runs(photos: Photos) -> None:
    file, *overrides = recipe_arguments(photos)
    recipe = load_recipe(Path(file), overrides)
    assert (recipe.run, recipe.seed) == (str(photos.run), 3)
    assert {stage.engine.precision for stage in recipe.stages.values()} == {"fp32"}
    assert {str(source.path) for stage in recipe.stages.values() for source in stage.data.sources} == {
        str(photos.run / "shards")
    }
    assert recipe.model.vision.image_size == IMAGE_SIZE  # type: ignore[attr-defined]
    (vision,) = (step for step in plan(photos) if step.name == "vision")
    parsed = convert_parser().parse_args(list(vision.command[3:]))
    assert (parsed.out, parsed.image_size) == (photos.run / "vision", IMAGE_SIZE)
    assert str(parsed.out) == recipe.model.vision.path  # type: ignore[attr-defined]
    assert load_recipe(Path(RECIPE), []).run == "runs/photos"


def test_the_suites_are_image_gain_and_captions_of_right_and_exchanged_photos(photos: Photos, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(suite(photos, 8))
    gain, right, exchanged = suite_configs(tmp_path / "suite.yaml")
    assert (gain.kind, right.kind, exchanged.kind) == ("image_gain", "caption", "caption")
    assert [config.shuffle_pictures for config in (right, exchanged)] == [False, True]  # type: ignore[union-attr]
    assert {config.limit for config in (gain, right, exchanged)} == {8}


def test_the_forecast_is_arithmetic_over_the_rehearsal(photos: Photos) -> None:
    (photos.run / "split").mkdir(parents=True)
    write_json(photos.run / "split" / "train.json", [{"file_name": str(number)} for number in range(160)])
    for stage, rate in (("align", 4.0), ("lora", 2.0)):
        for step, samples_per_s in enumerate([0.1, rate, rate], start=1):  # the first step compiles and warms up
            append_line(photos.rehearsal / stage / "metrics.jsonl", {"step": step, "samples_per_s": samples_per_s})
    # 4 steps of 16 rows take 16 s and 32 s, so starting two stages took 20 s; opening a bundle 3 s, a photo 1 s.
    found = read_forecast(photos, {"rehearsal": 68.0, "its bundle": 5.0, "few scores": 5.0, "more scores": 11.0})
    assert found.align_s == pytest.approx(160 * 3 / 4 + 10)
    assert found.lora_s == pytest.approx(160 * 4 / 2 + 20)
    assert found.scores_s == pytest.approx((3 * (3 + 20) + 3 * 5) / 2)
    said = Forecast(130.0, 260.0, 42.0).line("fp32")
    assert "in fp32: align about 2 min 10 s, LoRA 4 min 20 s" in said
    assert said.endswith("together 7 min 12 s")


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("fpu avx512f avx512_bf16", "bf16"),
        ("fpu amx_bf16 amx_tile", "bf16"),
        ("fpu avx2 avx512f", "fp32"),
        ("", "fp32"),
    ],
)
def test_units_for_bf16_decide_the_precision(flags: str, precision: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n")
    assert precision_of(tmp_path / "cpuinfo") == precision
    assert precision_of(tmp_path / "none") == "fp32"


def test_too_few_photos_are_one_line_before_anything_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "captions.json").write_text(json.dumps([{"file_name": "a.jpg", "caption": "A."}]))
    assert run_cli(command.main, [str(tmp_path), "--run", str(tmp_path / "run")]) == 2
    assert "1 photos, of which 200 are held out; more are needed" in capsys.readouterr().err
    assert not (tmp_path / "run" / "steps.json").exists()


def test_each_seed_has_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command._photos(["DATA"]).run == Path("runs/photos")
    assert command._photos(["DATA", "--seed", "1"]).run == Path("runs/photos_seed_1")
    assert command._photos(["DATA", "--precision", "bf16"]).precision == "bf16"
