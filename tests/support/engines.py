"""An engine whose limits tests reach quickly, and what they ask it."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

from eval.engine import Ended, Engine, EngineLimits, Event, Failed, Piece, Request
from eval.predictor import Decoding, Query, Turn
from tests.support.bundles import image
from tests.support.patience import GUARD_S, wait_until

LIMITS = EngineLimits(rows=4, waiting=8, cache_bytes=1 << 21)
LONG = Decoding(max_new_tokens=400)
QUESTION = "How many shapes are there in the image?"


class Inbox:
    """The events of one request."""

    def __init__(self) -> None:
        self._events: queue.Queue[Event] = queue.Queue()
        self.put = self._events.put

    def next(self) -> Event:
        return self._events.get(timeout=GUARD_S)

    def all(self) -> tuple[str, Ended | Failed]:
        """The text, and the last event."""
        text = ""
        while isinstance(event := self.next(), Piece):
            text += event.text
        assert self._events.empty()
        return text, event


def ask(text: str = QUESTION, kind: str = "circle") -> Query:
    return Query((image(kind),), (Turn("user", text),))


def submit(engine: Engine, decoding: Decoding, query: Query | None = None, **options: Any) -> tuple[Request, Inbox]:
    inbox = Inbox()
    prompt = engine.prepare(query or ask(), decoding)
    return engine.submit(prompt, decoding, inbox.put, **options), inbox


def until(condition: Callable[[], object]) -> None:
    wait_until("the engine has come so far", condition, every_s=0.002)
