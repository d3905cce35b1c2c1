"""What a visitor does while his answer is written: it ends, stays or goes as he wants, and nothing comes back later."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from gradio_client.client import Job

from models.common.errors import InputError
from tests.support.bundles import image
from tests.support.pages import page_client, page_server
from tests.support.patience import GUARD_S, wait_until
from tests.support.servers import Running as Server
from tests.support.servers import file_of, slow_steps, stuck_after
from tools.serve.chat import Cancel
from tools.serve.running import Running

LONG = (2, 1, 400, 1)
"""Hot, so that no end token comes soon."""


def test_a_session_has_one_answer_at_a_time() -> None:
    running, first, other = Running(), Cancel(), Cancel()
    with running.written("a", None, first), running.written("b", "photo", other):
        with pytest.raises(InputError, match="is being written"), running.written("a", None, Cancel()):
            pass
        running.drop("b", but_about="photo")
        running.drop("nobody")
        assert not other.is_set()
        running.drop("b", but_about=None)
        assert other.is_set()
        assert other.is_dropped
        running.stop("a")
        assert first.is_set()
        assert not first.is_dropped
    with running.written("a", None, Cancel()):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with page_server(tmp_path_factory.mktemp("page")) as running:
        yield running


class Visitor:
    """Asks by Gradio's own client, and presses by the requests that a browser sends."""

    def __init__(self, server: Server) -> None:
        self.url = f"{server.url}/gradio_api/"
        self.client = page_client(server.url)
        self._functions = httpx.get(f"{server.url}/config", timeout=GUARD_S).json()["dependencies"]

    def number(self, is_wanted: Callable[[dict[str, Any]], bool]) -> int:
        return next(number for number, function in enumerate(self._functions) if is_wanted(function))

    def ask(self, question: str, *decoding: float) -> Job:
        return self.client.submit(None, question, *decoding, api_name="/ask")

    def press(self, event: str, *data: Any) -> None:
        number = self.number(
            lambda function: function["backend_fn"] and any(name == event for _, name in function["targets"])
        )
        body = {"data": data, "fn_index": number, "session_hash": self.client.session_hash}
        httpx.post(f"{self.url}run/predict", json=body, timeout=GUARD_S).raise_for_status()


def turns(update: Any) -> list[str]:
    return ["".join(part["text"] for part in message["content"]) for message in update[0]]


@contextmanager
def being_answered(server: Server) -> Iterator[tuple[Visitor, Job]]:
    """A visitor whose answer has begun and does not end by itself within the block."""
    visitor = Visitor(server)
    with stuck_after(server, steps=10):
        job = visitor.ask("What is it?", *LONG)
        wait_until("the answer has begun", lambda: any(turns(update)[1:] > [""] for update in job.outputs()))
        yield visitor, job
    job.result(timeout=GUARD_S)
    server.until_idle()


@pytest.mark.slow
def test_stop_keeps_what_was_written_and_the_chat_goes_on(server: Server) -> None:
    before = server.engine.stats().cancelled
    with being_answered(server) as (visitor, job):
        visitor.press("stop")
    asked, answered = turns(job.outputs()[-1])
    assert server.engine.stats().cancelled == before + 1
    assert answered
    further = visitor.ask("And now?", 0, 1, 5, 1)
    further.result(timeout=GUARD_S)
    assert turns(further.outputs()[-1])[:3] == [asked, answered, "And now?"]


@pytest.mark.slow
def test_a_question_beside_an_answer_is_told_and_changes_nothing(server: Server) -> None:
    with being_answered(server) as (visitor, job):
        beside = visitor.ask("And this?", 0, 1, 5, 1)
        beside.result(timeout=GUARD_S)
        assert "an answer is being written" in str(beside.outputs()[-1])
        visitor.press("stop")
    assert turns(job.outputs()[-1])[0] == "What is it?"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["trash", "image"])
def test_a_chat_that_is_cleared_does_not_come_back(server: Server, how: str) -> None:
    with being_answered(server) as (visitor, job):
        if how == "trash":
            visitor.press("clear")
        else:
            files = {"files": ("photo.png", file_of(image()))}
            (path,) = httpx.post(f"{visitor.url}upload", files=files, timeout=GUARD_S).json()
            visitor.press("change", {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert turns(job.outputs()[-1]) == []
    anew = visitor.ask("And now?", 0, 1, 5, 1)
    anew.result(timeout=GUARD_S)
    assert len(turns(anew.outputs()[-1])) == 2


@pytest.mark.slow
def test_a_tab_that_is_closed_ends_even_a_search_with_beams(server: Server) -> None:
    """Its generator has one output, at its end, until which Gradio would wait."""
    before = server.engine.stats()
    visitor = Visitor(server)
    number = visitor.number(lambda function: function["api_name"] == "ask")
    session = visitor.client.session_hash
    body = {"data": [None, None, "What?", 0, 1, 400, 4], "fn_index": number, "session_hash": session}
    with slow_steps(server, 0.02):
        httpx.post(f"{visitor.url}queue/join", json=body, timeout=GUARD_S).raise_for_status()
        address = f"{visitor.url}queue/data?session_hash={session}"
        with httpx.stream("GET", address, timeout=GUARD_S) as stream:
            lines = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))
            next(message for message in lines if message["msg"] == "process_generating")
            wait_until("the search runs", lambda: server.engine.stats().running)
        server.until_idle()
    after = server.engine.stats()
    assert after.cancelled == before.cancelled + 1
    assert after.tokens - before.tokens < 400
