"""Nobody keeps the others out of the queue: not by joins that nobody listens to, and not by many of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from gradio.data_classes import PredictBodyInternal

from tools.serve.waiting import Mailbox, Shares, WaitingRoom

HOUR_S = 3600.0


class Visits:
    """A waiting room over a page of one function, and visitors who join it."""

    def __init__(self, **shares: Any) -> None:
        with gr.Blocks(analytics_enabled=False) as blocks:
            gr.Button().click(lambda: None, concurrency_limit=1)
        blocks.queue()
        self.room = WaitingRoom.instead_of(blocks._queue, Shares(**{"listen_s": HOUR_S, **shares}))

    async def join(self, session: str | None, host: str = "10.0.0.1") -> str:
        """Join; "" where that worked, else why not."""
        request: Any = SimpleNamespace(client=SimpleNamespace(host=host))
        body = PredictBodyInternal(data=[], fn_index=0, session_hash=session)
        is_in, told, _ = await self.room.push(body, request, None)
        return "" if is_in else str(told)

    def listen(self, session: str) -> asyncio.Task[Any]:
        return asyncio.ensure_future(self.take(session))

    async def take(self, session: str) -> Any:
        """Messages until the last one of an event."""
        while True:
            message = await self.room.pending_messages_per_session[session].get()
            if message.msg == "process_completed":
                return message

    @property
    def sessions(self) -> list[str]:
        return [event.session_hash for event in self.room._waiting()]


def run(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scene())  # type: ignore[arg-type]


@pytest.mark.parametrize("same", ["session", "address", "neither"])
def test_forty_joins_that_nobody_listens_to_keep_nobody_out(same: str) -> None:
    async def scene() -> None:
        visits = Visits()
        for number in range(40):
            session = "flood" if same == "session" else f"flood{number}"
            assert not await visits.join(session, "10.0.0.1" if same != "neither" else f"10.0.1.{number}")
        assert len(visits.room) <= 32
        assert visits.room.get_events() is None, "what nobody listens to is not answered"
        assert not await visits.join("guest")
        listening = visits.listen("guest")
        await asyncio.sleep(0)
        chosen = visits.room.get_events()
        assert chosen is not None
        assert chosen[0][0].session_hash == "guest"
        listening.cancel()

    run(scene)


@pytest.mark.parametrize(("shares", "hosts"), [({"session": 3}, 1), ({"address": 3}, 1), ({"all": 3}, 9)])
def test_those_who_listen_have_their_share_and_no_more(shares: dict[str, int], hosts: int) -> None:
    async def scene() -> None:
        visits, told = Visits(**shares), []
        listeners = []
        for number in range(9):
            session = "one" if "session" in shares else f"s{number}"
            told.append(await visits.join(session, f"10.0.0.{number % hosts}"))
            if not told[-1]:
                listeners.append(visits.listen(session))
                await asyncio.sleep(0)
        assert [bool(text) for text in told] == [False] * 3 + [True] * 6
        assert "waiting" in told[-1]
        for listener in listeners:
            listener.cancel()

    run(scene)


def test_addresses_take_turns() -> None:
    async def scene() -> None:
        visits = Visits()
        for session, host in (("a1", "10.0.0.1"), ("a2", "10.0.0.1"), ("a3", "10.0.0.1"), ("b1", "10.0.0.2")):
            assert not await visits.join(session, host)
            visits.room.pending_messages_per_session[session]._num_listeners = 1  # type: ignore[attr-defined]
        order = []
        while (chosen := visits.room.get_events()) is not None:
            order.append(chosen[0][0].session_hash)
        assert order == ["a1", "b1", "a2", "a3"]

    run(scene)


def test_an_ipv6_visitor_is_his_network() -> None:
    async def scene() -> None:
        visits = Visits(address=2)
        for number in range(6):
            assert not await visits.join(f"s{number}", f"2001:db8::{number}")
        assert visits.sessions == ["s4", "s5"]
        assert not await visits.join("other", "2001:db8:0:1::1")
        assert len(visits.sessions) == 3

    run(scene)


def test_who_does_not_listen_goes_and_leaves_nothing() -> None:
    async def scene() -> None:
        visits = Visits(listen_s=0.05)
        visits.room.start()
        assert not await visits.join("gone")
        while visits.sessions:
            await asyncio.sleep(0.02)
        assert not visits.room.pending_messages_per_session
        assert not visits.room.pending_event_ids_session
        assert not visits.room.event_ids_to_events
        visits.room.close()

    run(scene)


@pytest.mark.parametrize(
    ("shares", "closes", "told"),
    [({"wait_s": 0.0, "listen_s": 0.0}, False, "no answer within 0 s"), ({}, True, "is closing")],
)
def test_who_waited_too_long_or_for_a_page_that_closes_is_told(
    shares: dict[str, float], closes: bool, told: str
) -> None:
    async def scene() -> None:
        visits = Visits(**shares)
        assert not await visits.join("guest")
        listening = visits.listen("guest")
        await asyncio.sleep(0.01)
        if closes:
            visits.room.close_doors()
            assert "is closing" in await visits.join("late")
        looking = asyncio.ensure_future(visits.room._look_after())
        message = await listening
        assert not message.success
        assert told in message.output["error"]
        assert visits.room.num_here == 0
        looking.cancel()

    run(scene)


def test_a_mailbox_knows_who_listens() -> None:
    async def scene() -> None:
        mailbox = Mailbox()
        assert not mailbox.is_heard(HOUR_S)
        taking = asyncio.ensure_future(mailbox.get())
        await asyncio.sleep(0)
        assert mailbox.is_heard(0.0)
        mailbox.put_nowait("message")
        assert await taking == "message"
        time.sleep(0.001)
        assert mailbox.is_heard(HOUR_S)
        assert not mailbox.is_heard(0.0)

    run(scene)
