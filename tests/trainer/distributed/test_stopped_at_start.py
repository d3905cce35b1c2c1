"""A rank that is stopped while the run starts ends the others; ranks that are all suspended go on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from models.common.errors import InputError
from models.common.exit_codes import ExitCode
from tests.support.starts import LIMIT_S, ranks, stand_still
from trainer.distributed.start import Start

pytestmark = pytest.mark.slow


def fail_beside_a_stopped_rank(start: Start) -> None:
    start.meet()
    print("met", flush=True)
    time.sleep(5.0)  # so that the test has stopped the other
    raise InputError("data/x: unreadable")


def wait_for_another(start: Start) -> None:
    """As for a lock of the file system that a stopped rank holds: nothing of it is in the store."""
    start.timeout_s = 3.0
    start.meet()
    print("met", flush=True)
    time.sleep(10 * LIMIT_S)


def join_late(start: Start) -> None:
    """The first rank comes to the process group after the other, which waits for it."""
    from trainer.engine.process_group import leave_distributed, start_distributed

    store = start.meet()
    print("met", flush=True)
    if start.ranks.is_first:
        time.sleep(4.0)
    start_distributed(start.ranks, 12.0, store)
    print("joined", flush=True)
    leave_distributed()


def test_a_rank_that_fails_beside_a_stopped_first_rank_ends_all_the_same(tmp_path: Path) -> None:
    """Nobody can be told: the store is held by a process that answers nothing."""
    with ranks(tmp_path, stand_still, fail_beside_a_stopped_rank) as started:
        started.wait_until_met()
        pid = started.processes[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        started.processes[1].join(LIMIT_S)
        assert (started.processes[1].exitcode, started.output(1)) == (2, "met\nerror: data/x: unreadable\n")


@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_a_rank_that_is_stopped_ends_those_that_wait_for_it_without_a_collective(tmp_path: Path, stopped: int) -> None:
    with ranks(tmp_path, *[wait_for_another] * 3) as started:
        started.wait_until_met()
        pid = started.processes[stopped].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        for rank in {0, 1, 2} - {stopped}:
            started.processes[rank].join(LIMIT_S)
            assert started.processes[rank].exitcode == ExitCode.LOST_RANK
            assert "stands still" in started.output(rank) or f"rank {stopped} has stood still" in started.output(rank)


def test_ranks_that_are_all_suspended_for_longer_than_the_limit_go_on(tmp_path: Path) -> None:
    with ranks(tmp_path, *[wait_for_another] * 2) as started:
        started.wait_until_met()
        for number, seconds in ((signal.SIGSTOP, 6.0), (signal.SIGCONT, 4.0)):
            for process in started.processes:
                assert process.pid is not None
                os.kill(process.pid, number)
            time.sleep(seconds)
        assert [process.exitcode for process in started.processes] == [None, None]


def test_ranks_that_are_suspended_while_one_waits_for_the_other_join_all_the_same(tmp_path: Path) -> None:
    """For longer than the limit: torch's own clock would go on."""
    with ranks(tmp_path, join_late, join_late) as started:
        started.wait_until_met()
        time.sleep(1.0)
        for number, seconds in ((signal.SIGSTOP, 14.0), (signal.SIGCONT, 0.0)):
            for process in started.processes:
                assert process.pid is not None
                os.kill(process.pid, number)
            time.sleep(seconds)
        for code, output in started.ends():
            assert code == 0, output
            assert "joined" in output
