"""Real ranks that are stopped, killed, frozen or started twice: how each ends, and what a person reads."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from models.files import read_lines
from tests.support.backbones import tiny_recipe, write_recipe
from tests.support.shards import write_set
from tools.chaos.ranks import Group, server
from trainer.audit import audit
from trainer.interrupt import EXIT_LOST_RANK, EXIT_REQUEUE, MARGIN_S, Interrupt
from trainer.lock import EXIT_FENCED
from trainer.watch import Sign, holdup

LIMIT_S = 90.0
STEPS = 60
"""Enough that a stage is not over before something is done to it."""


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return server()


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """A stage that takes seconds, and one that ends at once."""
    write_set(tmp_path / "shards", [5, 1, 11])
    recipe = tiny_recipe(tmp_path, tmp_path / "shards")
    del recipe["stages"]["lora"]["tune"]["language"]
    recipe["stages"]["align"] |= {
        "duration": {"unit": "steps", "count": STEPS},
        "guard": {"rank_timeout_s": 6},
        "checkpoint": {"every_steps": 10, "keep": 2},
    }
    recipe["stages"]["lora"]["duration"] = {"unit": "steps", "count": 1}
    write_recipe(tmp_path / "recipe.yaml", recipe)
    return recipe


def start(context: ForkServerContext, folder: Path, *words: str, ranks: int = 2, stage: str = "align") -> Group:
    return Group.start(context, ranks, [str(folder / "recipe.yaml"), "--stage", stage, *words], folder / "log")


def steps(folder: Path) -> int:
    return len(read_lines(folder / "run" / "align" / "metrics.jsonl"))


def wait_for(what: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < deadline_s, "it did not come to that"
        time.sleep(0.02)


def codes(group: Group) -> list[int | None]:
    try:
        assert group.wait(LIMIT_S), "ranks were left over"
        return group.codes()
    finally:
        group.kill()


@pytest.mark.slow
def test_stopped_goes_on_and_one_directory_has_one_writer(
    context: ForkServerContext, recipe: dict[str, Any], tmp_path: Path
) -> None:
    running = start(context, tmp_path)
    wait_for(lambda: steps(tmp_path) >= 12)
    second = start(context, tmp_path, ranks=1)
    assert codes(second) == [2]
    log = (tmp_path / "log").read_text()
    assert re.search(r"error: \S+/run: process \d+ on \S+ has been writing here since", log)
    running.send(signal.SIGTERM, [1])  # one rank of two: both leave at the same step
    assert codes(running) == [EXIT_REQUEUE] * 2
    (told,) = re.findall(
        r"stopped by SIGTERM after step (\d+); saved in \S+; the same command goes on", log_of(tmp_path)
    )
    assert steps(tmp_path) == int(told)
    assert not (tmp_path / "run/lock.json").exists()
    last = start(context, tmp_path, stage="all")
    assert codes(last) == [0, 0]  # both stages
    assert steps(tmp_path) == STEPS
    for stage in ("align", "lora"):
        assert (tmp_path / "run" / stage / "finished.json").is_file()
    assert audit(tmp_path / "run/align").is_clean


def log_of(folder: Path) -> str:
    return (folder / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "named"),
    [
        (signal.SIGSTOP, r"rank 1 \(.*\) silent for \d+ s: killed, stopped"),
        (signal.SIGKILL, r"rank 1 \(.*\) silent for"),
    ],
)
def test_a_lost_rank_is_named_by_the_others(
    context: ForkServerContext, recipe: dict[str, Any], tmp_path: Path, number: signal.Signals, named: str
) -> None:
    group = start(context, tmp_path)
    wait_for(lambda: steps(tmp_path) >= 12)
    group.send(number, [1])
    sent_s = time.monotonic()
    try:
        assert group.wait(LIMIT_S, any_of_them=number == signal.SIGSTOP)
        assert group.codes()[0] == EXIT_LOST_RANK
        assert time.monotonic() - sent_s < 25  # the set time is 6 s; a loaded machine is slow
    finally:
        group.kill()
    assert re.search(rf"error: rank 0.*{named}", log_of(tmp_path))
    if number == signal.SIGSTOP:
        assert "trainer/" in (tmp_path / "run/align/ranks/00000.stacks.txt").read_text()
    again = start(context, tmp_path, ranks=1)
    assert codes(again) == [0]
    assert "took over from process" in log_of(tmp_path)
    assert audit(tmp_path / "run/align").is_clean


@pytest.mark.slow
def test_a_writer_that_lost_its_run_commits_nothing_more(
    context: ForkServerContext, recipe: dict[str, Any], tmp_path: Path
) -> None:
    group = start(context, tmp_path, ranks=1)
    wait_for(lambda: steps(tmp_path) >= 12)
    lock = tmp_path / "run/lock.json"
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "token": "another"}))
    assert codes(group) == [EXIT_FENCED]
    assert "another start has taken this run over" in log_of(tmp_path)
    assert json.loads(lock.read_text())["token"] == "another"


def test_the_jobs_end_leaves_room_for_steps_and_saves() -> None:
    far, near = (Interrupt({"SLURM_JOB_END_TIME": str(time.time() + MARGIN_S + left)}) for left in (100, 15))
    assert not far.is_due(step_s=10, save_s=10)
    assert near.is_due(step_s=5, save_s=5)
    assert near.reason is not None
    assert "the job's end in" in near.reason
    assert Interrupt({"SIGHTLINE_END_TIME": "1", "SLURM_JOB_END_TIME": str(time.time() + 9999)}).is_due(0, 0)
    assert not Interrupt({}).is_due(1e9, 1e9)


def sign(rank: int, step: int, phase: str, written_s: float = 100.0) -> Sign:
    return Sign(rank, f"node{rank}", 10**7 + rank, step, phase, 90.0, written_s)


@pytest.mark.parametrize(
    ("signs", "named"),
    [
        ([sign(0, 5, "forward")], "rank 1 never gave a sign"),
        ([sign(0, 5, "forward"), sign(1, 5, "forward", 50.0)], "rank 1 (node1, process 10000001) silent for 50 s"),
        ([sign(0, 6, "data"), sign(1, 5, "validation")], "the others wait for rank 1 (node1, process 10000001) at val"),
        ([sign(0, 6, "data"), sign(1, 6, "data")], "all ranks are at data of step 6: the network"),
    ],
)
def test_who_holds_a_run_up(signs: list[Sign], named: str) -> None:
    assert named in holdup(signs, 2, interval_s=1.0)
