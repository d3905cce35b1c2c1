"""What a client sees of a model that fails or stands still; and no refusal costs its connection."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from eval.predictor import Predictor
from tests.support.engines import Faults
from tests.support.patience import GUARD_S, wait_until
from tests.support.servers import Running, asking, running_server, slow_steps, stuck_after
from tools.serve.keys import Keys

PATH = "/v1/chat/completions"
LONG = {"max_tokens": 400, "temperature": 2.0, "seed": 3}
KEY = "a" * 24


@pytest.fixture
def server(tiny_predictor: Predictor) -> Iterator[Running]:
    with running_server(tiny_predictor) as running:
        yield running


def send(server: Running, **more: Any) -> httpx.Response:
    return httpx.post(server.url + PATH, json=asking("What?", **more), timeout=GUARD_S)


def test_a_step_that_fails_is_a_500_whole_and_an_error_in_a_stream(server: Running) -> None:
    with Faults(server.predictor, RuntimeError("secret detail"), 1, steps=True) as faults:
        faults.begin()
        failed = send(server, **LONG)
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in failed.text
        body = asking("What?", stream=True, **LONG)
        with (
            slow_steps(server, 0.02),
            httpx.stream("POST", server.url + PATH, json=body, timeout=GUARD_S) as answer,
        ):
            lines = answer.iter_lines()
            next(line for line in lines if "content" in line)
            faults.begin()
            events = [line.removeprefix("data: ") for line in lines if line]
        assert json.loads(events[-1])["error"]["code"] == "internal_error", "else it would look like a whole answer"
        assert send(server).status_code == 200


def test_without_memory_for_a_prompt_the_same_request_may_come_later(server: Running) -> None:
    with Faults(server.predictor, torch.OutOfMemoryError("planned"), 1, steps=False) as faults:
        faults.begin()
        refused = send(server)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert send(server).status_code == 200


def test_an_engine_that_fails_on_and_on_is_dead_and_says_so(server: Running) -> None:
    with Faults(server.predictor, RuntimeError("planned"), 3, steps=True) as faults:
        faults.begin()
        assert [send(server, **LONG).status_code for _ in range(3)] == [500] * 3
    health = httpx.get(server.url + "/health", timeout=GUARD_S)
    assert (health.status_code, health.json()["status"]) == (503, "dead")
    refused = send(server)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "dead")
    assert int(refused.headers["retry-after"]) >= 1


def test_a_stream_without_tokens_for_a_while_is_kept_alive_by_comments(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.serve.answer.KEEP_ALIVE_S", 0.05)
    body = asking("What?", stream=True, **LONG)
    with (
        stuck_after(server, steps=5) as goes_on,
        httpx.stream("POST", server.url + PATH, json=body, timeout=GUARD_S) as answer,
    ):
        lines = answer.iter_lines()
        next(line for line in lines if line == ": keep-alive")
        goes_on.set()
        *_, last = (line for line in lines if line)
    assert last == "data: [DONE]"


def test_a_second_message_of_a_conversation_is_sent_again_later(server: Running) -> None:
    message = {"message": "What?", "conversation_id": "mine", "max_new_tokens": 30}
    with slow_steps(server, 0.05), ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{server.url}/chat", json=message, timeout=GUARD_S)
        wait_until("the first is answered", lambda: server.engine.stats().running)
        assert httpx.post(f"{server.url}/chat", json=message, timeout=GUARD_S).status_code == 409
        assert first.result().status_code == 200


def test_after_every_refusal_the_connection_serves_the_next_request(
    tiny_predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text(f"alice {KEY}\n")
    body = json.dumps(asking("What?", max_tokens=2))
    with running_server(tiny_predictor, keys=Keys.read(tmp_path / "keys"), per_client=1) as server:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=GUARD_S)
        connection.connect()
        socket, seen = connection.sock, list[int]()

        def ask(method: str = "POST", path: str = PATH, content: str = body, **headers: str) -> None:
            named = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
            named |= {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, content, named)
            answer = connection.getresponse()
            assert json.loads(answer.read())
            assert connection.sock is socket, f"{answer.status} has cost the connection"
            seen.append(answer.status)

        ask(content="[")
        ask(Authorization="Bearer wrong")
        ask(Origin="https://evil.example")
        ask(path="/v1/models/other", method="GET")
        ask(method="PUT")
        ask(Content_Type="text/plain")
        with server.service.shares.one_more("alice"):
            ask()
        with monkeypatch.context() as patched:
            patched.setattr(server.engine, "prepare", lambda *_: 1 / 0)
            ask()
        engine, server.service.engine = server.service.engine, None
        ask()
        server.service.engine = engine
        ask()
        connection.close()
    assert seen == [400, 401, 403, 404, 405, 415, 429, 500, 503, 200]
