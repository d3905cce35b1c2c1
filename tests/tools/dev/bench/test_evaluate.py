"""The benchmark of evaluations: both sides answer the same questions alike, and the table is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.bundles import make_bundle
from tools.dev.bench.evaluate import main, questions


def test_questions_are_of_several_lengths_and_images_few() -> None:
    asked = questions(20)
    assert len(asked) == 20
    assert len({query.turns[0].text for query in asked}) == 3
    assert len({id(query.images[0]) for query in asked}) == 8


@pytest.mark.slow
def test_both_sides_give_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    assert main([str(bundle), "--questions", "4", "--tokens", "3", "--rounds", "1"]) == 0
    assert "4 of 4 answers are equal" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "runs/bench/evaluate.json").read_text())
    assert row["ours"] > 0
    assert row["peer"] > 0
