"""`sightline preflight --numerics`: the gradient in a stage's precision, what to try, and what cannot be measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.backbones import write_recipe
from tests.support.shards import write_set
from tests.support.sinks import sink_recipe
from tools.preflight import numerics
from tools.preflight.__main__ import main


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    write_set(folder / "shards", [8])
    return write_recipe(folder / "recipe.yaml", sink_recipe(folder, folder / "shards", ""))


def told(capsys: pytest.CaptureFixture[str], file: Path, stage: str, *overrides: str) -> tuple[int, list[str]]:
    code = main([str(file), *overrides, "--stage", stage, "--samples", "8", "--numerics"])
    return code, [line.strip() for line in capsys.readouterr().out.splitlines() if "numerics" in line]


def test_an_image_at_the_front_is_warned_of_and_openings_are_tried(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = told(capsys, file, "align")
    measured, warned, begin, line_feed = lines
    assert code == 0  # it is no reason not to start
    assert measured.startswith("numerics: gradient of 8 samples in bf16 beside fp32, on ")
    assert warned.startswith("warning: align: projector: bf16 carries little of the first gradient")
    opening, _, cosine = begin.partition(": projector cosine ")
    assert opening == "numerics: with data.template.opening: '<|im_start|>user\\n'"
    assert float(cosine.partition(",")[0]) > 0.98
    assert line_feed.startswith("numerics: with data.template.opening: '\\n': projector cosine ")


def test_behind_a_token_that_the_model_knows_there_is_nothing_to_warn_of(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines = told(capsys, file, "align", "stages.align.data.template.opening=null")
    assert len(lines) == 1


def test_what_cannot_be_measured_is_listed(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told(capsys, file, "lora")[1] == ["lora: numerics: it starts from align, which is not trained yet"]
    monkeypatch.setattr(numerics, "free_bytes", lambda device: 1)
    (line,) = told(capsys, file, "align")[1]
    assert line.startswith("align: numerics: fp32 takes ")
    fp32 = told(capsys, file, "align", "stages.align.engine.precision=fp32")[1]
    assert fp32 == ["numerics: the stage computes in fp32, the reference itself"]
