"""A stop is asked for by a signal or by the job's end, and stays asked for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from models.common.errors import InputError
from trainer.distributed.preemption import MARGIN_S, SIGNALS, PreemptionHandler


@pytest.fixture
def handler() -> Iterator[PreemptionHandler]:
    """Installed in this process, whose own handlers come back afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield PreemptionHandler().install()
    for number, action in before.items():
        signal.signal(number, action)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_and_is_named(handler: PreemptionHandler, number: signal.Signals) -> None:
    assert not handler.is_due(0, 0)
    signal.raise_signal(number)
    assert handler.is_due(0, 0)
    assert handler.reason == number.name


def test_a_second_ctrl_c_stops_at_once(handler: PreemptionHandler) -> None:
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_forked_child_is_not_asked(handler: PreemptionHandler) -> None:
    child = os.fork()
    if child == 0:
        try:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0 if handler.reason is None else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert handler.reason is None


def test_the_jobs_end_leaves_room_for_two_steps_and_two_saves() -> None:
    far, near = (PreemptionHandler(end_time_s=time.time() + MARGIN_S + left_s) for left_s in (100, 15))
    assert not far.is_due(step_s=10, save_s=10)
    assert near.is_due(step_s=5, save_s=5)
    assert near.reason is not None
    assert "the job's end in" in near.reason
    assert not PreemptionHandler().is_due(1e9, 1e9)


def test_the_end_comes_from_the_environment_ours_before_slurms() -> None:
    slurm = {"SLURM_JOB_END_TIME": "2000000000"}
    assert PreemptionHandler.from_environment(slurm).end_time_s == 2e9
    assert PreemptionHandler.from_environment({"SIGHTLINE_END_TIME": "1.5", **slurm}).end_time_s == 1.5
    assert PreemptionHandler.from_environment({"SIGHTLINE_END_TIME": ""}).end_time_s is None
    with pytest.raises(InputError, match=r"SIGHTLINE_END_TIME: found 'tomorrow'.*Unix seconds"):
        PreemptionHandler.from_environment({"SIGHTLINE_END_TIME": "tomorrow"})
