"""The cluster guide's table is what its command prints."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.support.paths import REPOSITORY
from tools.preflight.sizing import main

GUIDE = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^(python -m tools\.preflight\.sizing .*)\n```\n\n((?:\|.*\n)+)", GUIDE, re.MULTILINE)


def test_the_guide_shows_what_is_computed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert len(SHOWN) == 3
    for line, table in SHOWN:
        assert main(shlex.split(line)[3:]) == 0
        assert capsys.readouterr().out == table, f"docs/cluster.md is out of date: put in what this prints: {line}"
