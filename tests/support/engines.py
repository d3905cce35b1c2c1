"""An engine whose limits tests reach quickly, what they ask it, and a model that fails."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

from eval.engine import Ended, Engine, EngineLimits, Event, Failed, Piece, Request
from eval.predictor import Decoding, Predictor, Query, Turn
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


class Faults:
    """Makes the model fail so many times: in reading prompts, or in steps."""

    def __init__(self, predictor: Predictor, error: Exception, count: int, *, steps: bool) -> None:
        self.left = 0
        self._error, self._count, self._steps = error, count, steps
        layer = predictor.model.model.language_model.layers[-1]
        self._hook = layer.register_forward_pre_hook(self._fail, with_kwargs=True)

    def begin(self) -> None:
        self.left = self._count

    def _fail(self, _: Any, positional: tuple[Any, ...], __: Any) -> None:
        if self.left and (positional[0].shape[1] == 1) is self._steps:
            self.left -= 1
            raise self._error

    def __enter__(self) -> Faults:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def ask(text: str = QUESTION, kind: str = "circle") -> Query:
    return Query((image(kind),), (Turn("user", text),))


def submit(engine: Engine, decoding: Decoding, query: Query | None = None, **options: Any) -> tuple[Request, Inbox]:
    inbox = Inbox()
    prompt = engine.prepare(query or ask(), decoding)
    return engine.submit(prompt, decoding, inbox.put, **options), inbox


def until(condition: Callable[[], object]) -> None:
    wait_until("the engine has come so far", condition, every_s=0.002)
