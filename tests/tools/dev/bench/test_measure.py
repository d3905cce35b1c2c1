"""A comparison says how much faster, and is written where it is looked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.dev.bench.measure import compare, per_core_second, report


def work(amount: int) -> int:
    sum(number * number for number in range(amount))
    return 1


def test_a_ratio_is_the_rate_of_ours_over_the_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow = per_core_second(lambda: work(20_000)), per_core_second(lambda: work(80_000))
    row = compare("squares", "runs per core-second", fast, slow, rounds=5, packages=["numpy"])
    assert 2.5 < row.ratio < 6
    path = report("squares", [row], tmp_path)
    written = json.loads(path.read_text())
    assert set(written[0]) == {"what", "ours", "peer", "ratio", "unit", "device", "versions", "date"}
    assert "squares" in capsys.readouterr().out
