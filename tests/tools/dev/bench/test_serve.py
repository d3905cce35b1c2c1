"""The benchmark of serving: the server gives the library's answers, and every figure of its table is there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.bundles import make_bundle
from tools.dev.bench.serve import main


@pytest.mark.slow
def test_the_table_is_written_and_answers_are_the_librarys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    import tools.dev.bench.serve as bench
    from tests.support.paths import REPOSITORY

    bundle = make_bundle(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(bench, "_LARGE", (900, 600))
    monkeypatch.setattr(bench, "_PHOTO", (400, 300))
    peer = f"{sys.executable} -m tools.cli serve {bundle} --device cpu --port PORT --per-client 64 --name {bundle}"
    cores = os.sched_getaffinity(0)
    try:
        assert (
            main([str(bundle), "--questions", "8", "--tokens", "3", "--rounds", "1", "--photos", "2", "--peer", peer])
            == 0
        )
    finally:
        os.sched_setaffinity(0, cores)
    printed = capsys.readouterr().out
    assert "1 clients: 8 of 8 answers are the library's" in printed
    assert "16 clients: 8 of 8 answers are the library's" in printed
    assert "the peer: 8 of 8 answers are the same" in printed
    rows = json.loads((tmp_path / "runs/bench/serve.json").read_text())
    assert [row["what"] for row in rows] == [
        "16 clients / batches of 16",
        "16 clients, new pictures / batches of 16",
        "1 client / stream",
        "16 clients / 1 client",
        "16 clients / the other server",
        "p95 of 16 clients / median of the other server",
        "slowest /health while decoding",
        "memory under large pictures",
    ]
    assert all(row["ours"] >= 0 and row["peer"] > 0 for row in rows)
