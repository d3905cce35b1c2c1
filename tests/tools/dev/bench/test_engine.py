"""The benchmark of the engine: callers at once get what the library gives, and the table is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.bundles import make_bundle
from tools.dev.bench.engine import main


@pytest.mark.slow
def test_callers_get_the_same_answers_and_three_figures_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    words = [str(bundle), "--questions", "6", "--tokens", "3", "--clients", "3", "--rounds", "1"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "6 of 6 answers are equal" in said
    assert "rows a step" in said
    rows = json.loads((tmp_path / "runs/bench/engine.json").read_text())
    assert [row["what"].split(" / ")[0] for row in rows] == ["3 callers", "1 caller", "first token, 1 caller"]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)
