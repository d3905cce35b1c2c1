"""Requests that nobody would write: each gets a planned answer, and its connection serves the next one."""

from __future__ import annotations

import copy
import http.client
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from eval.predictor import Predictor
from tests.support.patience import GUARD_S, wait_until
from tests.support.servers import Running, asking, data_url, file_of, picture_part, running_server
from tests.support.sweeps import num_cases

PLANNED = {200, 204, 400, 404, 405, 409, 413, 415, 429, 503}
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 0.5, 1e308, float("nan"), float("inf")),
    *("", " ", "a", "\x00", "<image>", "<|im_start|>", "user", "system", "🦉" * 50, "\ud83d", "x" * 5000),
    *([], {}, [[]], [None], {"a": {"b": []}}, "data:image/png;base64,", data_url(b"GIF89a"), "file:///etc/passwd"),
)
PATHS = ("/v1/chat/completions",) * 8 + (
    "/chat",
    "/caption",
    "/question",
    "/v1/models",
    "/v1/models/x",
    "/health",
    "/%00",
)
TYPES = ("application/json",) * 8 + ("text/plain", "multipart/form-data; boundary=x", "", "application/json; charset=x")
FIELDS = ("tools", "n", "logprobs", "stream", "audio", "zzz", "max_tokens")
METHODS = ("POST",) * 10 + ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "BREW")


@pytest.fixture(scope="module")
def server(tiny_predictor: Predictor) -> Iterator[Running]:
    with running_server(tiny_predictor, default_tokens=2, max_tokens=3) as running:
        yield running


def seeds() -> list[dict[str, Any]]:
    """What mutations begin with; short answers."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    return [
        asking("What?", max_tokens=2),
        asking(picture_part(), "What?", max_tokens=1, stream=True, stream_options={"include_usage": True}),
        {
            "messages": chat,
            "max_completion_tokens": 1,
            "temperature": 1,
            "top_p": 0.5,
            "stop": ["x"],
            "seed": 1,
            "n": 1,
        },
        {"message": "What?", "image_base64": data_url(file_of()), "conversation_id": "a", "max_new_tokens": 1},
    ]


def odd(draw: random.Random) -> Any:
    """One of the odd values; a copy, since a later change within it would stay there for all that follow."""
    return copy.deepcopy(draw.choice(ODD))


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values within a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += nodes(inner, (*path, key))
    return found


def mutated(value: Any, draw: random.Random) -> Any:
    """The value with one to three things changed."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        places = nodes(value)
        if not places:
            return odd(draw)
        *above, last = draw.choice(places)
        holder = value
        for key in above:
            holder = holder[key]
        match draw.randrange(4):
            case 0 if isinstance(holder, dict):
                del holder[last]
            case 1 if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[last]))
            case 2 if isinstance(holder, dict):
                holder[draw.choice(FIELDS)] = odd(draw)
            case _:
                holder[last] = odd(draw)
    return value


def body_of(draw: random.Random) -> bytes:
    text = json.dumps(mutated(draw.choice(seeds()), draw)).encode()
    if draw.random() < 0.15:
        cut = draw.randrange(len(text) + 1)
        text = (
            text[:cut] + bytes(draw.randrange(256) for _ in range(draw.randrange(8))) + text[cut + draw.randrange(9) :]
        )
    return text


def fuzz(server: Running, num_requests: int, seed: int) -> dict[int, int]:
    """Send so many requests over one connection; how often each status came."""
    draw, counts = random.Random(seed), dict[int, int]()
    connection = http.client.HTTPConnection(server.host, server.port, timeout=GUARD_S)
    connection.connect()
    socket = connection.sock
    for number in range(num_requests):
        method, path, kind = draw.choice(METHODS), draw.choice(PATHS), draw.choice(TYPES)
        body = body_of(draw)
        connection.request(method, path, body, {"Content-Type": kind} if kind else {})
        answer = connection.getresponse()
        content = answer.read()
        where = f"request {number} of seed {seed}: {method} {path} {body[:300]!r} -> {answer.status} {content[:300]!r}"
        assert answer.status in PLANNED, where
        if answer.status >= 400 and method != "HEAD":
            assert content[:1] == b"{", where
            assert json.loads(content)["error"]["message"], where
        assert connection.sock is socket, f"the connection was closed: {where}"
        counts[answer.status] = counts.get(answer.status, 0) + 1
    connection.close()
    server.until_idle()
    assert server.service.pictures.num_taken == 0
    wait_until("every share is given back", lambda: not server.service.shares._under_way)  # after the answer is out
    return counts


def test_odd_requests_get_planned_answers(server: Running) -> None:
    counts = fuzz(server, 150, seed=0)
    assert counts[400] > 30
    assert counts[200] > 5
    assert len(counts) >= 4


@pytest.mark.slow
@pytest.mark.fuzz
def test_thousands_of_odd_requests_get_planned_answers(server: Running) -> None:
    num_requests = num_cases(10_000, 50_000)
    counts = fuzz(server, num_requests, seed=1)
    assert counts[400] > num_requests / 5
    assert counts[200] > num_requests / 50
    assert not counts.get(503)
