"""A real run of two ranks, killed in every way and resumed, ends with the weights of one that nobody touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.errors import run_cli
from tools.chaos.__main__ import main

pytestmark = pytest.mark.slow


def test_five_kills_change_nothing(tmp_path: Path) -> None:
    assert run_cli(main, ["--out", str(tmp_path), "--kills", "5", "--each-kind", "--rank-timeout", "8"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["weights_equal"]
    assert (report["lost"], report["repeated"], report["hangs"]) == (0, 0, 0)
    assert report["kills"] >= 4  # a full disk needs a user who may mount
    assert report["starts"] > 1
