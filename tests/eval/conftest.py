"""The tiny benchmark, for every test of a measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.benchmarks import TinyBenchmark, make_benchmark


@pytest.fixture
def tiny(tmp_path: Path) -> TinyBenchmark:
    return make_benchmark(tmp_path)
