"""An answer that has begun is waited for to its end, whole ones too, of which nothing comes before."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from eval.engine import Ended, Event, Piece
from tests.support.patience import GUARD_S
from tests.support.servers import Running, asking, slow_steps
from tools.serve.answer import Answer
from tools.serve.errors import ApiError
from tools.serve.gate import Visit
from tools.serve.outbox import Outbox
from tools.serve.settings import Times


class Asked:
    """A request of the engine's that has so many tokens."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def cancel(self) -> None:
        raise AssertionError("it goes on")


async def text_of(num_tokens: int) -> str:
    outbox = Outbox[Event]()
    answer = Answer(Asked(num_tokens), outbox, Times(queue_s=0.02, answer_s=30.0), Visit("1", "", "/", "POST"))
    await answer.first()
    outbox.put(Piece("red"))
    outbox.put(Ended("stop", 1, 2, 0.0, 0.0, 0.0))
    return "".join([piece async for piece in answer.pieces()])


def test_who_has_begun_in_time_may_take_longer() -> None:
    assert asyncio.run(text_of(1)) == "red"


def test_who_has_not_begun_in_time_is_told() -> None:
    with pytest.raises(ApiError, match="no answer began within"):
        asyncio.run(text_of(0))


@pytest.mark.parametrize(("streamed", "num_wakes"), [(False, (1, 1)), (True, (2, 13))], ids=["whole", "stream"])
def test_the_event_loop_is_woken_once_for_a_whole_answer(
    server: Running, monkeypatch: pytest.MonkeyPatch, streamed: bool, num_wakes: tuple[int, int]
) -> None:
    bridge, wakes = server.service._bridge, list[int]()
    assert bridge is not None
    deliver = bridge._deliver

    def counted() -> None:
        wakes.append(1)
        deliver()

    server.until_idle()
    with slow_steps(server, 0.02):
        monkeypatch.setattr(bridge, "_deliver", counted)
        body = asking("What?", stream=streamed, max_tokens=12, temperature=2, seed=1)
        assert httpx.post(server.url + "/v1/chat/completions", json=body, timeout=GUARD_S).status_code == 200
    fewest, most = num_wakes
    assert fewest <= len(wakes) <= most
