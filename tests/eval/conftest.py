"""The tiny benchmark, for every test of a measure, and a program that stands for Java."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.support.benchmarks import TinyBenchmark, make_benchmark


@pytest.fixture
def tiny(tmp_path: Path) -> TinyBenchmark:
    return make_benchmark(tmp_path)


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called java, first on PATH; the test writes what it does."""
    program = tmp_path / "java"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return program


def write_program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
