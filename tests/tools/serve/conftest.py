"""One tiny model, one server over it for the tests of a file, and clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from eval.predictor import Predictor
from tests.support.bundles import make_bundle
from tests.support.patience import GUARD_S
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


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=GUARD_S) as made:
        yield made


@pytest.fixture(scope="module")
def wire(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=GUARD_S) as made:
        yield made
