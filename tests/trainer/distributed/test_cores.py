"""Which cores a rank gets: its own ones, within what it may use, and none where binding would do harm."""

from __future__ import annotations

import logging

import pytest

from models.common import cores
from trainer.distributed.context import DistributedContext
from trainer.distributed.cores import Place, bound_cores, decide

EIGHT = tuple(range(8))


def test_ranks_of_a_machine_divide_its_cores() -> None:
    places = [Place("one", EIGHT, 4), Place("one", EIGHT, 4), Place("two", EIGHT, 4)]
    assert [list(decide(rank, places, {}, None)[0]) for rank in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], list(EIGHT)]
    assert decide(0, places, {}, None)[1] == (
        "2 ranks share 8 cores of one; rank 0 has 0, 1, 2, 3 for its 4 threads, each bound to its part"
    )


def test_a_launcher_s_masks_are_kept() -> None:
    places = [Place("one", (0, 1), 2), Place("one", (2, 3), 2)]
    assert [list(decide(rank, places, {}, None)[0]) for rank in range(2)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("places", "environment", "quota", "reason"),
    [
        ([Place("one", EIGHT, 4)] * 2, {"OMP_PLACES": "cores"}, None, "OMP_PLACES is set"),
        ([Place("one", EIGHT, 4)] * 2, {}, 2.0, "the control group has the time of 2"),
        ([Place("one", EIGHT, 8)] * 2, {}, None, "OMP_NUM_THREADS=4 would be faster"),
        ([Place("one", EIGHT, 1)] * 9, {}, None, "more threads than cores"),
        ([Place("one", (0, 1), 1), Place("one", (1, 2), 1)], {}, None, "their masks overlap in part"),
    ],
)
def test_nothing_is_bound_where_it_would_do_harm(
    places: list[Place], environment: dict[str, str], quota: float | None, reason: str
) -> None:
    mine, line = decide(0, places, environment, quota)
    assert not mine
    assert "not bound" in line
    assert reason in line


def test_one_thread_alone_is_left_where_it_is() -> None:
    assert decide(0, [Place("one", EIGHT, 1)], {}, None) == ((), "")
    assert decide(0, [Place("one", (), 4)] * 2, {}, None) == ((), "")


def test_masks_are_restored_and_a_gpu_s_rank_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer.distributed.cores.decide", lambda *_arguments: (sorted(cores.allowed())[:1], "a line"))
    before = cores.allowed()
    with caplog.at_level(logging.INFO), bound_cores(DistributedContext(), {}):
        assert cores.allowed() == set(sorted(before)[:1])
    assert cores.allowed() == before
    assert caplog.messages == ["cores: a line"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with bound_cores(DistributedContext(), {}):
        assert cores.allowed() == before
