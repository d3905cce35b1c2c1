"""One tiny model and one server over it, for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.predictor import Predictor
from tests.support.bundles import make_bundle
from tests.support.servers import Running, running_server


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def tiny_predictor(tiny_bundle: Path) -> Predictor:
    return Predictor.open(tiny_bundle, device="cpu")


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    with running_server(Predictor.open(tiny_bundle, device="cpu")) as running:
        yield running
