"""What one rank cannot do at the start ends every rank within seconds, with one line; signals are heard at once."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from models.common.errors import AwayError, InputError, run_cli
from models.common.exit_codes import ExitCode
from tests.support.ranks import forkserver_context
from trainer.distributed.context import from_environment
from trainer.distributed.ports import CHOOSE_ANOTHER, choose_port
from trainer.distributed.preemption import PreemptionHandler
from trainer.distributed.start import Start, as_fault, identity

LIMIT_S = 120.0
"""Guards against waiting for ever; nothing is measured by it."""

Act = Callable[[Start], Any]


def stand_still(start: Start) -> None:
    start.meet()
    print("met", flush=True)
    time.sleep(10 * LIMIT_S)


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


def be_killed(start: Start) -> None:
    """When the other is there: before, nobody knows of it."""
    start.meet().wait(["sightline/rank/1"], timedelta(seconds=LIMIT_S))
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def lose_a_peer(start: Start) -> None:
    start.meet()
    raise RuntimeError("[/build/gloo/transport/tcp/pair.cc:553] Connection closed by peer")


def _run_rank(rank: int, acts: list[Act], port: int, run: str, log: str) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(len(acts)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def main(argv: list[str]) -> int:
        PreemptionHandler().install()
        start = Start(from_environment(), run, timeout_s=10 * LIMIT_S).open()
        try:
            with start.phase():
                acts[rank](start)
        finally:
            start.close()
            start.linger()
        return 0

    os._exit(run_cli(main, []))


@dataclass
class Ranks:
    """Real processes, each with its output in a file."""

    processes: list[BaseProcess]
    logs: list[Path]

    def output(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def wait_until_met(self) -> None:
        end_s = time.monotonic() + LIMIT_S
        while not all(log.exists() and "met" in log.read_text() for log in self.logs):
            assert time.monotonic() < end_s
            time.sleep(0.05)

    def ends(self) -> list[tuple[int | None, str]]:
        """Exit code and output of each; the word that says that they met is left out."""
        for process in self.processes:
            process.join(LIMIT_S)
        return [
            (process.exitcode, self.output(rank).replace("met\n", "")) for rank, process in enumerate(self.processes)
        ]


@contextmanager
def ranks(folder: Path, *acts: Act, port: int | None = None, run: str = "a run") -> Iterator[Ranks]:
    port = port or choose_port()
    logs = [folder / f"{run}.{rank}.log" for rank in range(len(acts))]
    processes: list[BaseProcess] = [
        forkserver_context().Process(target=_run_rank, args=(rank, list(acts), port, run, str(log)))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    try:
        yield Ranks(processes, logs)
    finally:
        for process in processes:
            process.kill()
            process.join()


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
def test_a_rank_that_fails_beside_a_stopped_first_rank_ends_all_the_same(tmp_path: Path) -> None:
    """Nobody can be told: the store is held by a process that answers nothing."""
    with ranks(tmp_path, stand_still, fail_beside_a_stopped_rank) as started:
        started.wait_until_met()
        pid = started.processes[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        started.processes[1].join(LIMIT_S)
        assert (started.processes[1].exitcode, started.output(1)) == (2, "met\nerror: data/x: unreadable\n")


@pytest.mark.slow
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


@pytest.mark.slow
def test_ranks_that_are_all_suspended_for_longer_than_the_limit_go_on(tmp_path: Path) -> None:
    with ranks(tmp_path, *[wait_for_another] * 2) as started:
        started.wait_until_met()
        for number, seconds in ((signal.SIGSTOP, 6.0), (signal.SIGCONT, 4.0)):
            for process in started.processes:
                assert process.pid is not None
                os.kill(process.pid, number)
            time.sleep(seconds)
        assert [process.exitcode for process in started.processes] == [None, None]


@pytest.mark.slow
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
        target=_run_rank, args=(1, [stand_still, stand_still], port, "a run", str(tmp_path / "log"))
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
