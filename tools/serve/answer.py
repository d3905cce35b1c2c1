"""One answer on its way from the engine to a client: its pieces, its limits of time, and why it ended.

engine.submit --> waits (503 after queue_s) --> first event --> pieces --> Ended
                                                    |             |
                                                    |             +-- answer_s is over, the engine failed: ApiError
                                                    +-- only now does a response begin
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Protocol

from eval.engine import Ended, Event, Failed, Piece, QueueFull, Refused
from tools.serve.errors import ApiError
from tools.serve.gate import Visit
from tools.serve.outbox import Outbox
from tools.serve.settings import Times

KEEP_ALIVE_S = 15.0


class Submitted(Protocol):
    """What the engine gives for a request, as far as an answer needs it."""

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""

    def cancel(self) -> None:
        """End it before the next token."""


class Answer:
    """Reads one request's events. Whoever makes one ends it with `cancel`, which is nothing after its end.

    Args:
        request: what the engine gave for it.
        outbox: where its events come.
        times: the limits of its time.
        visit: whose log line tells its end.
    """

    def __init__(self, request: Submitted, outbox: Outbox[Event], times: Times, visit: Visit) -> None:
        self._request, self._outbox, self._times, self._visit = request, outbox, times, visit
        self._early: list[Event] = []
        self._deadline_s = time.monotonic() + times.answer_s
        self.ended: Ended | None = None
        """Set when all pieces were read."""

    async def first(self) -> None:
        """Wait until the answer has an event, or has begun without one when its time to wait is over.

        Raises:
            ApiError: 503, the engine did not come to it in time.
        """
        limit_s = min(self._times.queue_s, self._times.answer_s)
        self._early = await self._outbox.get(limit_s)
        if not self._early and not self._request.num_tokens:
            text = f"no answer began within {limit_s:g} s, since many are waiting: ask again later"
            raise ApiError(503, text, code="overloaded", retry_after_s=5, reason="queue_time")
        for event in self._early:
            if isinstance(event, Failed):
                raise _failure(event)

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes; an empty piece after a while in which none came.

        Raises:
            ApiError: the answer took too long, or the engine ended it.
        """
        while self.ended is None:
            events, self._early = self._early or await self._more(), []
            text = "".join(event.text for event in events if isinstance(event, Piece))
            for event in events:
                if isinstance(event, Failed):
                    raise _failure(event)
                if isinstance(event, Ended):
                    self._end(event)
            if text or not events:
                yield text

    async def _more(self) -> list[Event]:
        left_s = self._deadline_s - time.monotonic()
        events = await self._outbox.get(min(max(left_s, 0.001), KEEP_ALIVE_S))
        if not events and time.monotonic() >= self._deadline_s:
            text = f"the answer took longer than {self._times.answer_s:g} s and ends here"
            raise ApiError(503, text, code="timeout", reason="answer_time")
        return events

    def _end(self, event: Ended) -> None:
        self._visit.finish = event.reason
        self._visit.facts.update(
            prompt_tokens=event.prompt_tokens,
            tokens=event.tokens,
            queue_s=event.queue_s,
            prefill_s=event.prefill_s,
            decode_s=event.decode_s,
        )
        self.ended = event

    def cancel(self) -> None:
        """End it before the engine's next token, if it goes on still."""
        if self.ended is None:
            self._request.cancel()
            if self._visit.finish == "-":
                self._visit.finish = "cancelled"


def refusal(error: Refused) -> ApiError:
    """What the engine does not take, or take to its end: 429 where it is full, 503 where it closes."""
    status = 429 if isinstance(error, QueueFull) else 503
    return ApiError(status, str(error), code=error.reason, retry_after_s=error.retry_after_s, reason=error.reason)


def _failure(event: Failed) -> ApiError:
    if isinstance(event.error, Refused):
        return refusal(event.error)
    if event.retry_after_s is None:
        return ApiError(500, "the model failed on this request; the server's log says more", code="internal_error")
    text = "the server has not enough memory for this now: ask again later"
    return ApiError(503, text, code="overloaded", retry_after_s=event.retry_after_s, reason="memory")
