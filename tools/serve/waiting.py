"""Who waits for the model: Gradio's queue with a share for each visitor, limits of time, and an end.

    join --share and room?--> waits, listened to --> answered
             |                   |
             +-- refused         +-- nobody listens, waited too long, the page closes: dropped and told

A visitor is a session of the page, and all sessions of an address together. Whoever joins and does not listen to the
messages keeps nobody out: such joins are not answered, are the first to give way, and go after some seconds.
Does not own answering (`tools.serve.chat`).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gradio.queueing import Event, Queue
from gradio.server_messages import ProcessCompletedMessage
from gradio.utils import LRUCache, run_coro_in_background

from tools.serve.shares import address_group

_LOOK_S = 0.5
"""Seconds between two looks at who still listens."""
_CLOSING_S = 1.0
"""Seconds that a page has to learn that its messages' stream was closed, before a new question of it is taken."""


@dataclass(frozen=True)
class Shares:
    """How many may wait at once, and for how long. An IPv6 address counts by its first 64 bits."""

    all: int = 32
    address: int = 12
    session: int = 4
    listen_s: float = 15.0
    """How long a join may go without a listener; a page listens within the time of one request."""
    wait_s: float = 600.0


class Mailbox(asyncio.Queue[Any]):
    """The messages to one session, and whether somebody takes them."""

    def __init__(self) -> None:
        super().__init__()
        self._num_listeners = 0
        self._heard_s = float("-inf")

    async def get(self) -> Any:
        """The next message."""
        self._num_listeners += 1
        try:
            return await super().get()
        finally:
            self._num_listeners -= 1
            self._heard_s = time.monotonic()

    def is_heard(self, within_s: float) -> bool:
        """Whether somebody listens, or did within so many seconds."""
        return self._num_listeners > 0 or time.monotonic() - self._heard_s < within_s

    def was_left_within(self, within_s: float) -> bool:
        """Whether somebody listened within so many seconds, and nobody does now."""
        return self._num_listeners == 0 and time.monotonic() - self._heard_s < within_s


class WaitingRoom(Queue):
    """Gradio's queue, whose methods run in the server's event loop. `close_doors` and `num_here` are for any thread."""

    def __init__(self, *arguments: Any, shares: Shares = Shares(), **options: Any) -> None:
        super().__init__(*arguments, max_size=shares.all, **options)
        self.shares, self.is_closing = shares, False
        self._turns: LRUCache[str, float] = LRUCache(10_000)
        """When each address was last answered."""
        self.when_left: Callable[[str], None] = lambda session: None
        """Told of a session whose messages nobody takes any more."""

    @classmethod
    def instead_of(cls, queue: Queue, shares: Shares = Shares()) -> WaitingRoom:
        """A waiting room in the place of a queue that Gradio made and that nobody has joined yet."""
        return cls(
            queue.live_updates,
            queue.max_thread_count,
            queue.update_intervals,
            blocks=queue.blocks,
            default_concurrency_limit=queue.default_concurrency_limit,
            shares=shares,
        )

    def start(self) -> None:
        """Begin to answer, and to look after those who wait."""
        super().start()
        run_coro_in_background(self._look_after)

    def close_doors(self) -> None:
        """Let nobody in any more, and tell those who wait; what is being answered goes on."""
        self.is_closing = True

    @property
    def num_here(self) -> int:
        """How many wait or are being answered."""
        return len(self) + self.get_active_worker_count()

    async def push(self, body: Any, request: Any, username: str | None) -> Any:
        """Let a join in, or say why not; see Gradio's own."""
        if body.session_hash is None:  # of the API, where each call is its own session
            body.session_hash = secrets.token_hex(16)
        with self._stream_held(body.session_hash):
            await self._stream_settled(body.session_hash)
            refusal = self._refusal(body.session_hash, _address_of(request))
            if refusal:
                return False, refusal, "queue_full"
            if body.session_hash not in self.pending_messages_per_session:
                self.pending_messages_per_session[body.session_hash] = Mailbox()
            return await super().push(body, request, username)

    async def clean_events(self, *, session_hash: str | None = None, event_id: str | None = None) -> None:
        """See Gradio's own, which lets what runs go on until its next output: a beam search has one, at its end."""
        await super().clean_events(session_hash=session_hash, event_id=event_id)
        if session_hash is not None:
            self.when_left(session_hash)

    def get_events(self) -> tuple[list[Event], bool, str] | None:
        """The next to be answered: of those that are listened to, one of the address whose turn was longest ago."""
        for name, line in list(self.event_queue_per_concurrency_id.items()):
            if line.concurrency_limit is not None and line.current_concurrency >= line.concurrency_limit:
                continue
            heard = [event for event in line.queue if self._is_heard(event, _LOOK_S)]
            if heard:
                chosen = min(heard, key=lambda event: self._turns.get(_address_of(event.request), 0.0))
                self._turns[_address_of(chosen.request)] = time.monotonic()
                line.queue.remove(chosen)
                return [chosen], False, name
        return None

    @contextmanager
    def _stream_held(self, session: str) -> Iterator[None]:
        """Keep a session's open stream of messages from being closed: Gradio closes it when no event is pending."""
        joining = secrets.token_hex(16)
        self.pending_event_ids_session.setdefault(session, set()).add(joining)
        try:
            yield
        finally:
            pending = self.pending_event_ids_session.get(session, set())
            pending.discard(joining)
            if not pending:
                self.pending_event_ids_session.pop(session, None)

    async def _stream_settled(self, session: str) -> None:
        """Wait until a session's stream is open, or its page knows that it is closed.

        A page that is answered while it still takes a closed stream for open waits there for ever: its question would
        be asked, never answered, and nothing said.
        """
        mailbox = self.pending_messages_per_session.get(session)
        while isinstance(mailbox, Mailbox) and mailbox.was_left_within(_CLOSING_S):
            await asyncio.sleep(_CLOSING_S / 20)

    def _refusal(self, session: str, address: str) -> str:
        """Why a join is not let in, or ""; joins that nobody listens to make room for it."""
        if self.is_closing:
            return "the page is closing: ask again in a minute"
        groups: list[tuple[int, Callable[[Event], bool], str]] = [
            (self.shares.session, lambda event: event.session_hash == session, "you have questions waiting already"),
            (
                self.shares.address,
                lambda event: _address_of(event.request) == address,
                "your network has many questions waiting already",
            ),
            (self.shares.all, lambda event: True, "too many questions are waiting"),
        ]
        for limit, belongs, text in groups:
            group = [event for event in self._waiting() if belongs(event)]
            unheard = [event for event in group if not self._is_heard(event, 0.0)]
            if len(group) - len(unheard) >= limit:
                return f"{text}: ask again when they are answered"
            for event in sorted(unheard, key=lambda event: event.enqueue_time)[: max(len(group) - limit + 1, 0)]:
                self._drop(event)
        return ""

    def _waiting(self) -> list[Event]:
        return [event for line in self.event_queue_per_concurrency_id.values() for event in line.queue]

    def _is_heard(self, event: Event, within_s: float) -> bool:
        mailbox = self.pending_messages_per_session.get(event.session_hash)
        return isinstance(mailbox, Mailbox) and mailbox.is_heard(within_s)

    def _drop(self, event: Event, told: str = "") -> None:
        """Take an event out of its line, and tell its listener why."""
        self.event_queue_per_concurrency_id[event.concurrency_id].queue.remove(event)
        self.event_ids_to_events.pop(event._id, None)
        if told:
            output = {"error": told, "visible": True, "duration": 10, "title": "Not answered"}
            self.send_message(event, ProcessCompletedMessage(output=output, success=False, title="Not answered"))
            return
        pending = self.pending_event_ids_session.get(event.session_hash, set())
        pending.discard(event._id)
        if not pending:  # nobody took its messages, and nobody will
            self.pending_event_ids_session.pop(event.session_hash, None)
            self.pending_messages_per_session.pop(event.session_hash, None)

    async def _look_after(self) -> None:
        while not self.stopped:
            for event, told in self._overdue(self._waiting()):
                self._drop(event, told)
            await asyncio.sleep(_LOOK_S)

    def _overdue(self, events: Iterable[Event]) -> Iterable[tuple[Event, str]]:
        """Those who wait no longer, and what they are told."""
        for event in events:
            if self.is_closing:
                yield event, "the page is closing: ask again in a minute"
            elif time.monotonic() - event.enqueue_time < self.shares.listen_s:
                continue
            elif not self._is_heard(event, self.shares.listen_s):
                yield event, ""
            elif time.monotonic() - event.enqueue_time > self.shares.wait_s:
                yield event, f"no answer within {self.shares.wait_s:g} s, since many are waiting: ask again later"


def _address_of(request: Any) -> str:
    """Where a request comes from; behind a proxy of this machine uvicorn takes it from X-Forwarded-For."""
    return address_group(str(request.client.host) if getattr(request, "client", None) is not None else "")
