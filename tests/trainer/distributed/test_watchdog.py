"""Heartbeats say where each rank is; a run that stands still ends with the name of the rank that holds it up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from models.common.exit_codes import ExitCode
from tests.support.paths import REPOSITORY
from trainer.distributed.context import DistributedContext
from trainer.distributed.heartbeats import Heartbeat, file_of, read_heartbeats, write_heartbeat
from trainer.distributed.watchdog import STALE_S, Watchdog, find_straggler, limited_start, silence

KEYS = {"rank", "host", "pid", "step", "phase", "since_s", "written_s"}


def beat(rank: int, step: int, phase: str, written_s: float = 100.0) -> Heartbeat:
    """Of a process on another machine, in its phase since second 90."""
    return Heartbeat(rank, f"node{rank}", 10**7 + rank, step, phase, 90.0, written_s)


@pytest.mark.parametrize(
    ("heartbeats", "named"),
    [
        ([beat(0, 5, "forward")], "rank 1 never gave a sign of life"),
        ([], "rank 0, 1 never gave a sign of life"),
        (
            [beat(0, 5, "forward"), beat(1, 5, "forward", 50.0)],
            "rank 1 (node1, process 10000001) silent for 50 s: killed, stopped, or its machine is cut off",
        ),
        (
            [beat(0, 6, "data"), beat(1, 5, "validation")],
            "the others wait for rank 1 (node1, process 10000001) at validation of step 5 for 10 s",
        ),
        (
            [beat(0, 6, "the sum over ranks"), beat(1, 6, "data"), beat(2, 6, "the sum over ranks")],
            "the others wait for rank 1 (node1, process 10000001) at data of step 6 for 10 s",
        ),
        ([beat(0, 6, "data"), beat(1, 6, "data")], "all ranks are at data of step 6: the network between them"),
    ],
)
def test_who_holds_a_run_up(heartbeats: list[Heartbeat], named: str) -> None:
    assert find_straggler(heartbeats, max(2, len(heartbeats)), silent_s=4.0).startswith(named)


def test_a_heartbeat_is_written_at_the_start_and_says_at_the_end_that_it_is_over(tmp_path: Path) -> None:
    directory = tmp_path / "align" / "ranks"
    watchdog = Watchdog(directory, DistributedContext(1, 2), timeout_s=600)
    assert not directory.exists()  # nothing happens before the start
    watchdog.start()
    file = directory / "00001.jsonl"
    first = json.loads(file.read_text())
    assert first.keys() == KEYS
    assert (first["phase"], first["step"], first["rank"]) == ("starting", 0, 1)
    watchdog.mark("forward", 7)
    watchdog.close()
    last = json.loads(file.read_text())
    assert (last["phase"], last["step"]) == ("ended", 7)
    watchdog.close()  # a second time does no harm


def test_the_thread_writes_where_the_main_thread_is(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, DistributedContext(), timeout_s=600)
    watchdog.interval_s = 0.01
    watchdog.start()
    watchdog.mark("backward", 3)
    give_up_s = time.monotonic() + 60
    while json.loads((tmp_path / "00000.jsonl").read_text())["phase"] != "backward":
        assert time.monotonic() < give_up_s
        time.sleep(0.01)
    watchdog.close()
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}  # nobody is missed after the end


PROGRAM = """
import itertools, json, pathlib, sys, time
from trainer.distributed.console import set_up_logging
from trainer.distributed.context import DistributedContext
from trainer.distributed.watchdog import Watchdog, exit_at_start, limited_start
set_up_logging()
directory, ranks = pathlib.Path(sys.argv[1]), DistributedContext(0, 2)
def stand_still():
    time.sleep(600)
"""


def run_program(program: str, folder: Path) -> tuple[int, str]:
    """The exit code and the output of a process that runs `program` after the lines above."""
    words = [sys.executable, "-c", PROGRAM + program, str(folder)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_rank_that_stands_still_names_the_other_and_leaves_its_stacks(tmp_path: Path) -> None:
    program = "watchdog = Watchdog(directory, ranks, 0.3).start(); watchdog.mark('backward', 4); stand_still()"
    code, output = run_program(program, tmp_path)
    assert code == ExitCode.LOST_RANK
    assert output == (
        "error: rank 0 has been at backward of step 4 for 0 s: rank 1 never gave a sign of life; stacks in "
        f"{tmp_path}/00000.stacks.txt; the last checkpoint stands, start the same command again\n"
    )
    assert "stand_still" in (tmp_path / "00000.stacks.txt").read_text()


def test_a_wall_clock_that_is_set_anew_ends_no_run(tmp_path: Path) -> None:
    program = """
watchdog = Watchdog(directory, DistributedContext(), 3600)
watchdog.interval_s = 0.01
watchdog.start()
ahead = itertools.count(10**10)
time.time = lambda: next(ahead)
while json.loads((directory / "00000.jsonl").read_text())["written_s"] < 10**10 + 3:  # it has looked three times
    time.sleep(0.01)
watchdog.close()
"""
    assert run_program(program, tmp_path) == (0, "")


def test_stacks_that_cannot_be_written_keep_no_process_alive(tmp_path: Path) -> None:
    (tmp_path / "00000.stacks.txt").mkdir()
    code, output = run_program("Watchdog(directory, ranks, 0.3).start(); stand_still()", tmp_path)
    assert code == ExitCode.LOST_RANK
    assert "rank 1 never gave a sign of life" in output


def test_a_failed_collective_ends_the_process_with_a_name(tmp_path: Path) -> None:
    program = "Watchdog(directory, ranks, 1.0).start().exit_for_lost_rank('Connection closed')"
    code, output = run_program(program, tmp_path)
    assert code == ExitCode.LOST_RANK
    assert output.startswith("error: rank 0: rank 1 never gave a sign of life (Connection closed); the last checkpoint")
    code, output = run_program("exit_at_start(ranks, 'Connection closed')", tmp_path)
    assert code == ExitCode.LOST_RANK
    assert "while the run starts (Connection closed)" in output


def test_ranks_that_do_not_meet_end(tmp_path: Path) -> None:
    code, output = run_program("with limited_start(ranks, 0.05): stand_still()", tmp_path)
    assert code == ExitCode.LOST_RANK
    assert "while the run starts (the ranks have not met within 0 s)" in output


def test_ranks_that_meet_go_on() -> None:
    with limited_start(DistributedContext(), 3600):
        watchers = [thread for thread in threading.enumerate() if thread.name == "limited-start"]
    assert watchers
    for watcher in watchers:
        watcher.join(60)
        assert not watcher.is_alive()


@pytest.mark.parametrize(
    "program",
    ["Watchdog(directory, ranks, 2.0).start(); wait()", "with limited_start(ranks, 2.0): wait()"],
)
def test_a_process_that_was_suspended_for_longer_than_the_limit_goes_on(tmp_path: Path, program: str) -> None:
    """As Slurm does with a whole job: SIGSTOP, and SIGCONT much later."""
    wait = "\ndef wait():\n    print('on', flush=True); sys.stdin.readline(); time.sleep(1.0)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{PROGRAM}{wait}{program}\nprint('through')", str(tmp_path)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(3.0)
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate("\n", timeout=120)
    finally:
        process.kill()
    assert (process.returncode, output) == (0, "through\n")


def ranks_of(num_nodes: int, per_node: int) -> list[DistributedContext]:
    world_size = num_nodes * per_node
    return [DistributedContext(rank, world_size, rank % per_node) for rank in range(world_size)]


def test_a_thousand_ranks_have_a_file_for_each_node_and_create_nothing_more(tmp_path: Path) -> None:
    ranks = ranks_of(128, 8)
    for each in ranks:
        write_heartbeat(tmp_path, each, beat(each.rank, 1, "data"))
    made = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    assert len(made) == 128
    for each in ranks[::7]:
        write_heartbeat(tmp_path, each, beat(each.rank, 2, "forward", 200.0))
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == made
    found = read_heartbeats(tmp_path, 1024)
    assert [each.rank for each in found] == list(range(1024))
    assert [each.rank for each in found if each.step == 2] == list(range(0, 1024, 7))
    assert len(read_heartbeats(tmp_path, 10)) == 10


def test_a_part_that_is_half_written_is_passed_over_and_one_by_another_layout_is_older(tmp_path: Path) -> None:
    for each in ranks_of(1, 3):
        write_heartbeat(tmp_path, each, beat(each.rank, 1, "data"))
    file = file_of(tmp_path, DistributedContext(0, 3))
    content = file.read_bytes()
    file.write_bytes(content[:520] + b"#" * 40 + content[560:])
    write_heartbeat(tmp_path, DistributedContext(2, 3, 0), beat(2, 5, "data", 300.0))
    assert [(each.rank, each.step) for each in read_heartbeats(tmp_path, 3)] == [(0, 1), (2, 5)]


@pytest.mark.parametrize("age_s", [0.0, 25.0, STALE_S])
def test_a_node_that_is_cut_off_is_named_and_a_file_system_that_shows_what_is_old_blames_nobody(age_s: float) -> None:
    """1,024 ranks stand in a sum; what was read of all other nodes may be as old as NFS allows."""
    silent_s = silence(interval_s=10.0, timeout_s=900.0)
    own = [beat(rank, 7, "the sum over ranks", 1000.0) for rank in range(8)]
    others = [beat(rank, 7, "the sum over ranks", 1000.0 - age_s) for rank in range(8, 1024)]
    assert find_straggler([*own, *others], 1024, silent_s).startswith("all ranks are at the sum over ranks of step 7")
    cut_off = [beat(rank, 7, "forward", 100.0) for rank in range(16, 24)]
    named = find_straggler([*own, *others[:8], *cut_off, *others[16:]], 1024, silent_s)
    assert named.startswith("rank 16 (node16, process 10000016) silent for 900 s, rank 17 (")
    assert "rank 24" not in named


@pytest.mark.parametrize(("interval_s", "timeout_s", "silent_s"), [(5.0, 900.0, 80.0), (0.4, 2.0, 1.6), (10, 900, 100)])
def test_silence_is_longer_than_a_file_system_s_memory_where_the_limit_allows_it(
    interval_s: float, timeout_s: float, silent_s: float
) -> None:
    assert silence(interval_s, timeout_s) == pytest.approx(silent_s)


def test_many_ranks_write_less_often(tmp_path: Path) -> None:
    assert Watchdog(tmp_path, DistributedContext(0, 64), 900.0).interval_s == 5.0
    assert Watchdog(tmp_path, DistributedContext(0, 1024), 900.0).interval_s == pytest.approx(10.24)
