"""The tiny benchmark, for every test of a measure, a program that stands for Java, and an engine."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.engine import Engine
from eval.predictor import Predictor
from tests.support.arrivals import CACHES
from tests.support.benchmarks import TinyBenchmark, make_benchmark
from tests.support.bundles import make_bundle
from tests.support.engines import LIMITS
from tests.support.patience import wait_until


@pytest.fixture(scope="module", params=CACHES)
def predictor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """Of a model that hardly ever ends an answer by itself, with either cache."""
    opened = Predictor.open(make_bundle(tmp_path_factory.mktemp("bundle")), device="cpu")
    return Predictor(opened.model, opened.processor, device="cpu", is_fixed=request.param == "fixed")


@pytest.fixture
def engine(predictor: Predictor) -> Iterator[Engine]:
    engine = Engine(predictor, LIMITS).start()
    wait_until("the engine serves", lambda: engine.state == "serving", every_s=0.002)
    yield engine
    engine.close()
    assert engine.stats().running == engine.stats().waiting == engine.stats().cache_bytes_promised == 0
    assert engine.stats().kept_bytes == 0
    assert all(thread.name != "engine" for thread in threading.enumerate())


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
