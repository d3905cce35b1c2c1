"""A body is refused, timed and counted while it comes, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

from eval.predictor import Predictor
from tests.support.patience import GUARD_S, wait_until
from tests.support.raw_http import COMPLETIONS, answer_of, connected, head
from tests.support.servers import Running, asking, running_server
from tools.serve.body import _PARSING, parse_json
from tools.serve.errors import ApiError
from tools.serve.wire import TextPart


@pytest.fixture(scope="module")
def narrow(tiny_predictor: Predictor) -> Iterator[Running]:
    with running_server(tiny_predictor, max_body_bytes=200_000, small_body_bytes=10_000, body_s=0.5) as running:
        yield running


def test_a_large_body_is_refused_by_its_length_before_it_comes(narrow: Running) -> None:
    with connected(narrow) as connection:
        connection.sendall(head(narrow, "Content-Length: 200001", "Expect: 100-continue"))
        status, body, is_closed = answer_of(connection)
    assert (status, is_closed) == (413, True)
    assert body["error"]["code"] == "body_too_large"


def test_a_body_of_the_largest_size_is_read(narrow: Running) -> None:
    body = json.dumps(asking("What?"))
    answer = httpx.post(
        narrow.url + COMPLETIONS,
        content=body + " " * (200_000 - len(body)),
        headers={"content-type": "application/json"},
        timeout=GUARD_S,
    )
    assert answer.status_code == 200
    assert narrow.service.bodies.budget.num_taken == 0


def test_while_a_large_body_is_parsed_small_ones_are_and_large_ones_wait() -> None:
    small, large = (
        bytearray(b'{"type": "text", "text": "a"}'),
        bytearray(b'{"type": "text", "text": "%s"}' % (b"a" * 70_000)),
    )
    with ThreadPoolExecutor(1) as pool:
        with _PARSING:
            waiting = pool.submit(parse_json, TextPart, large)
            assert parse_json(TextPart, small).text == "a"
            assert not waiting.done()
        assert waiting.result(GUARD_S).text == "a" * 70_000
    for damaged in (small[:-1], large[:-1]):
        with pytest.raises(ApiError):
            parse_json(TextPart, damaged)
    assert not _PARSING.locked()


def test_chunks_without_a_length_are_counted(narrow: Running) -> None:
    with connected(narrow) as connection:
        connection.sendall(head(narrow, "Transfer-Encoding: chunked"))
        for _ in range(21):
            connection.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
        status, _, is_closed = answer_of(connection)
    assert (status, is_closed) == (413, True)
    wait_until("the body's bytes are given back", lambda: narrow.service.bodies.budget.num_taken == 0)


def test_who_sends_slowly_is_told(narrow: Running) -> None:
    with connected(narrow) as connection:
        connection.sendall(head(narrow, "Content-Length: 1000") + b"{")
        status, _, is_closed = answer_of(connection)
    assert (status, is_closed) == (408, True)


def test_a_body_that_breaks_off_leaves_nothing(narrow: Running) -> None:
    for _ in range(3):
        with connected(narrow) as connection:
            connection.sendall(head(narrow, "Content-Length: 150000") + b"{" * 20_000)
    wait_until("the body's bytes are given back", lambda: narrow.service.bodies.budget.num_taken == 0)
    wait_until("its share is given back", lambda: not narrow.service.shares._under_way)


def test_a_refused_connection_serves_the_next_request(server: Running) -> None:
    with connected(server) as connection:
        for body in (b"{", b"[]", json.dumps(asking("")).encode()):
            connection.sendall(head(server, f"Content-Length: {len(body)}") + body)
            assert answer_of(connection)[0] == 400
        body = json.dumps(asking("What?")).encode()
        connection.sendall(head(server, f"Content-Length: {len(body)}") + body)
        assert answer_of(connection)[0] == 200


LINE = b"X-Pad: " + b"a" * 10_000 + b"\r\n"


@pytest.mark.parametrize(
    ("beginning", "piece"),
    [
        (b"POST " + COMPLETIONS.encode() + b"?", b"a" * 10_000),
        (b"POST " + COMPLETIONS.encode() + b" HTTP/1.1\r\nHost: localhost\r\n", LINE),
        (b"POST " + COMPLETIONS.encode() + b" HTTP/1.1\r\nX-Pad: ", b"a" * 10_000),
    ],
    ids=["address", "headers", "header"],
)
def test_a_head_without_end_is_refused(server: Running, beginning: bytes, piece: bytes) -> None:
    with connected(server) as connection, suppress(ConnectionError):
        connection.sendall(beginning)
        for _ in range(1000):
            connection.sendall(piece)
        raise AssertionError("ten megabytes were taken")


def test_who_offers_another_protocol_is_answered_in_this_one(server: Running) -> None:
    """As Java's own client does with each request until it knows better; with a body, and again on the connection."""
    body = json.dumps(asking("What?", max_tokens=1)).encode()
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
    with connected(server) as connection:
        for _ in range(2):
            connection.sendall(head(server, *offer, f"Content-Length: {len(body)}") + body)
            assert answer_of(connection)[0] == 200
