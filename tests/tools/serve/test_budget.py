"""Bytes that coroutines and threads share: first come, first served, and whoever gives up leaves nothing."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

import pytest

from tests.support.patience import GUARD_S
from tools.serve.budget import Budget
from tools.serve.outbox import Bridge, Outbox


def test_who_asks_first_gets_first_even_where_a_later_one_would_fit() -> None:
    async def run() -> list[str]:
        budget, order = Budget(10), list[str]()

        async def take(name: str, num_bytes: int) -> None:
            async with budget.taken(num_bytes, GUARD_S):
                order.append(name)
                assert budget.num_taken <= 10
                await asyncio.sleep(0.01)

        await asyncio.gather(take("large", 8), take("larger", 9), take("small", 1), take("all", 10))
        assert budget.num_taken == 0
        return order

    assert asyncio.run(run()) == ["large", "larger", "small", "all"]


def test_who_gives_up_or_is_cancelled_stands_in_nobodys_way() -> None:
    async def run() -> None:
        budget = Budget(10)
        async with budget.taken(6, GUARD_S):
            with pytest.raises(asyncio.TimeoutError):
                async with budget.taken(5, 0.01):
                    raise AssertionError("there is no room")
            waiting = asyncio.ensure_future(hold(budget, 5))
            behind = asyncio.ensure_future(hold(budget, 4))
            await asyncio.sleep(0)
            waiting.cancel()
            await behind
        assert budget.num_taken == 0

    async def hold(budget: Budget, num_bytes: int) -> None:
        async with budget.taken(num_bytes, GUARD_S):
            await asyncio.sleep(0)

    asyncio.run(run())


def test_threads_and_coroutines_share_one_budget() -> None:
    budget, most = Budget(100), [0]

    def by_thread(number: int) -> None:
        with budget.taken_by_thread(10 + number % 50, GUARD_S):
            most.append(budget.num_taken)

    async def by_loop() -> None:
        async def one(number: int) -> None:
            async with budget.taken(10 + number % 50, GUARD_S):
                most.append(budget.num_taken)
                await asyncio.sleep(0)

        await asyncio.gather(*(one(number) for number in range(100)))

    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(by_thread, number) for number in range(100)]
        asyncio.run(by_loop())
        for each in done:
            each.result()
    assert max(most) <= 100
    assert budget.num_taken == 0


def test_a_thread_that_waits_in_vain_is_told() -> None:
    budget = Budget(1)
    with budget.taken_by_thread(1, 1):
        with pytest.raises(FutureTimeoutError), budget.taken_by_thread(1, 0.01):
            pass
        with pytest.raises(ValueError, match="2 bytes of 1"), budget.taken_by_thread(2, 1):
            pass
    assert budget.num_taken == 0


def test_events_of_a_thread_arrive_in_order_and_wake_the_loop_once_a_flush() -> None:
    async def run() -> None:
        bridge: Bridge[int] = Bridge()
        outboxes: list[Outbox[int]] = [Outbox() for _ in range(3)]

        def engine() -> None:
            for number in range(1000):
                for outbox in outboxes:
                    bridge.post(outbox, number)
                bridge.flush()

        thread = threading.Thread(target=engine)
        thread.start()
        for outbox in outboxes:
            found: list[int] = []
            while len(found) < 1000:
                found += await outbox.get(GUARD_S)
            assert found == list(range(1000))
        thread.join()

    asyncio.run(run())
