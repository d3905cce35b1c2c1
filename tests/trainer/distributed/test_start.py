"""What one rank cannot do at the start ends every rank within seconds, with one line; signals are heard at once."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from models.common.errors import AwayError, InputError
from models.common.exit_codes import ExitCode
from tests.support.ranks import forkserver_context
from tests.support.starts import LIMIT_S, Act, ranks, run_rank, stand_still
from trainer.distributed.ports import CHOOSE_ANOTHER, choose_port
from trainer.distributed.start import Start, as_fault, identity


def wait_in_c(start: Start) -> None:
    """As in a collective: Python's own signal handlers do not run there."""
    store = start.meet()
    print("met", flush=True)
    store.wait(["never written"], timedelta(seconds=10 * LIMIT_S))


def find_bad_data(start: Start) -> None:
    start.meet()
    raise InputError("data/x: unreadable")


def find_bad_data_before_meeting(start: Start) -> None:
    raise InputError("data/x: unreadable")


def have_a_bug(start: Start) -> None:
    start.meet()
    raise ZeroDivisionError("by zero")


def be_killed(start: Start) -> None:
    """When the other is there: before, nobody knows of it."""
    start.meet().wait(["sightline/rank/1"], timedelta(seconds=LIMIT_S))
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def lose_a_peer(start: Start) -> None:
    start.meet()
    raise RuntimeError("[/build/gloo/transport/tcp/pair.cc:553] Connection closed by peer")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [find_bad_data, find_bad_data_before_meeting])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("others", [stand_still, wait_in_c])
def test_what_one_rank_cannot_is_every_ranks_line(tmp_path: Path, fault: Act, place: int, others: Act) -> None:
    acts = [others] * 3
    acts[place] = fault
    with ranks(tmp_path, *acts) as started:
        assert started.ends() == [(2, "error: data/x: unreadable\n")] * 3


@pytest.mark.slow
def test_what_every_rank_finds_each_of_them_says_once(tmp_path: Path) -> None:
    with ranks(tmp_path, *[find_bad_data_before_meeting] * 2) as started:
        assert started.ends() == [(2, "error: data/x: unreadable\n")] * 2


@pytest.mark.slow
def test_a_bug_before_the_loop_ends_the_others_and_keeps_its_traceback(tmp_path: Path) -> None:
    with ranks(tmp_path, stand_still, have_a_bug) as started:
        (first, line), (second, output) = started.ends()
    assert first == ExitCode.LOST_RANK  # not its node's fault
    assert line == "error: rank 1 could not start: ZeroDivisionError: by zero\n"
    assert second == 1
    assert output.startswith(line)
    assert "Traceback" in output


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
def test_a_lost_rank_ends_the_others_to_be_started_again(tmp_path: Path, place: int) -> None:
    acts = [stand_still, stand_still]
    acts[place] = be_killed if place == 0 else lose_a_peer
    with ranks(tmp_path, *acts) as started:
        ends = started.ends()
    code, output = ends[1]
    assert code == ExitCode.LOST_RANK
    assert "error: rank 1: a rank ended or stands still while the run starts" in output
    if place == 1:
        assert ends[0] == ends[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_heard_while_a_rank_waits_where_python_does_not_run(tmp_path: Path, number: signal.Signals) -> None:
    with ranks(tmp_path, wait_in_c, wait_in_c) as two:
        two.wait_until_met()
        for process in two.processes:
            assert process.pid is not None
            os.kill(process.pid, number)
        said = f"stopped by {number.name} before the first step; the same command starts again\n"
        assert [(code, said in output) for code, output in two.ends()] == [(ExitCode.REQUEUE, True)] * 2


@pytest.mark.slow
def test_a_signal_is_heard_by_a_rank_that_waits_for_the_first(tmp_path: Path) -> None:
    port = choose_port()
    process = forkserver_context().Process(
        target=run_rank, args=(1, [stand_still, stand_still], port, "a run", str(tmp_path / "log"))
    )
    process.start()
    assert process.pid is not None
    try:
        time.sleep(1.0)
        os.kill(process.pid, signal.SIGTERM)
        process.join(LIMIT_S)
        assert process.exitcode in (ExitCode.REQUEUE, -signal.SIGTERM)  # before it could take the signal over
    finally:
        process.kill()


@pytest.mark.slow
def test_a_port_of_somebody_else_is_said_by_every_rank(tmp_path: Path) -> None:
    with closing(socket.socket()) as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()  # and never answers
        port = stranger.getsockname()[1]
        with ranks(tmp_path, stand_still, stand_still, port=port) as started:
            line = f"error: port {port} of 127.0.0.1 is taken by another process; {CHOOSE_ANOTHER}\n"
            assert started.ends() == [(2, line)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("run", ["another run", "a run"])  # the same command twice is a stranger, too
def test_a_port_of_another_training_run_is_said_and_that_run_goes_on(tmp_path: Path, run: str) -> None:
    port = choose_port()
    (tmp_path / "second").mkdir()
    with ranks(tmp_path, stand_still, stand_still, port=port) as on:
        on.wait_until_met()
        with ranks(tmp_path / "second", stand_still, stand_still, port=port, run=run) as started:
            line = f"error: port {port} of 127.0.0.1 is taken by another process; {CHOOSE_ANOTHER}\n"
            assert started.ends() == [(2, line)] * 2
        assert [process.exitcode for process in on.processes] == [None, None]


def test_ranks_of_one_start_agree_on_what_it_is() -> None:
    assert identity(["r.yaml", "--local_rank=0", "a=1"]) == identity(["r.yaml", "a=1", "--local_rank=3"])
    assert identity(["r.yaml", "a=1"]) != identity(["r.yaml", "a=2"])


def test_what_a_person_can_mend_is_the_line_itself() -> None:
    assert as_fault(InputError("x: bad"), 3) == (2, "x: bad")
    assert as_fault(AwayError("x: away"), 3) == (75, "x: away")
    code, line = as_fault(PermissionError(13, "Permission denied", "runs/x"), 3)
    assert (code, line.count("\n")) == (2, 0)
    assert line.startswith("runs/x: Permission denied")
    assert as_fault(KeyError("a"), 3) == (1, "rank 3 could not start: KeyError: 'a'")
