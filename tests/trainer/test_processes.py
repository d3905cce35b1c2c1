"""Real ranks that are stopped, killed, frozen or started twice: how each ends, and its messages."""

from __future__ import annotations

import json
import re
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from models.common.exit_codes import ExitCode
from models.common.files import read_lines
from tests.support.backbones import tiny_recipe, write_recipe
from tests.support.patience import GUARD_S, wait_until
from tests.support.shards import write_set
from trainer.ledger.audit import audit
from trainer.local_ranks import RankGroup, fork_server

RANK_TIMEOUT_S = 15.0
"""Longer than any phase of a run that is well takes on a machine with other work beside it."""
STEPS = 60
"""Enough that a stage is not over before something is done to it."""


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return fork_server()


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """A stage that takes seconds, and one that ends at once."""
    write_set(tmp_path / "shards", [5, 1, 11])
    recipe = tiny_recipe(tmp_path, tmp_path / "shards")
    del recipe["stages"]["lora"]["tune"]["language"]
    recipe["stages"]["align"] |= {
        "duration": {"unit": "steps", "count": STEPS},
        "guard": {"rank_timeout_s": RANK_TIMEOUT_S},
        "checkpoint": {"every_steps": 10, "keep": 2},
    }
    recipe["stages"]["lora"]["duration"] = {"unit": "steps", "count": 1}
    write_recipe(tmp_path / "recipe.yaml", recipe)
    return recipe


def start(context: ForkServerContext, folder: Path, *words: str, ranks: int = 2, stage: str = "align") -> RankGroup:
    return RankGroup.start(context, ranks, [str(folder / "recipe.yaml"), "--stage", stage, *words], folder / "log")


def steps(folder: Path) -> int:
    return len(read_lines(folder / "run" / "align" / "metrics.jsonl"))


def codes(group: RankGroup) -> list[int | None]:
    try:
        assert group.wait(GUARD_S), "ranks were left over"
        return group.codes()
    finally:
        group.kill()


@pytest.mark.slow
def test_stopped_goes_on_and_one_directory_has_one_writer(
    context: ForkServerContext, recipe: dict[str, Any], tmp_path: Path
) -> None:
    running = start(context, tmp_path)
    wait_until("12 steps are taken", lambda: steps(tmp_path) >= 12)
    second = start(context, tmp_path, ranks=1)
    assert codes(second) == [2]
    log = (tmp_path / "log").read_text()
    assert re.search(r"error: \S+/run: process \d+ on \S+ has been writing here since", log)
    running.send(signal.SIGTERM, [1])  # one rank of two: both leave at the same step
    assert codes(running) == [ExitCode.REQUEUE] * 2
    (told,) = re.findall(
        r"stopped by SIGTERM after step (\d+); saved in \S+; the same command resumes", log_of(tmp_path)
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
def test_what_keeps_one_rank_from_starting_ends_all_with_one_line(
    context: ForkServerContext, recipe: dict[str, Any], tmp_path: Path
) -> None:
    assert codes(start(context, tmp_path, "stages.align.batch.global_rows=1")) == [2, 2]
    lines = log_of(tmp_path).splitlines()
    assert len(lines) == 2
    assert set(lines) == {
        "error: stages.align.batch.global_rows: 1, fewer than the 2 ranks of this start; each computes one row at "
        "least, so raise it to 2 or start fewer ranks"
    }
    assert not (tmp_path / "run").exists()
    (tmp_path / "log").unlink()
    # What only the first rank opens, when everything else is built.
    (tmp_path / "run/align").mkdir(parents=True)
    (tmp_path / "run/align/tensorboard").write_text("a file where a directory should be")
    first, second = codes(start(context, tmp_path, "tracking.tensorboard=true"))
    assert (first, second) in ((2, 2), (1, ExitCode.LOST_RANK))
    assert len(re.findall(r"^error: .*tensorboard.*$", log_of(tmp_path), re.MULTILINE)) == 2
    assert not (tmp_path / "run/lock.json").exists()


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
    started_s = time.monotonic()
    group = start(context, tmp_path)
    wait_until("12 steps are taken", lambda: steps(tmp_path) >= 12)
    group.send(number, [1])
    sent_s = time.monotonic()
    try:
        assert group.wait(GUARD_S, ended=any if number == signal.SIGSTOP else all)
        assert group.codes()[0] == ExitCode.LOST_RANK
        # a loaded machine is slow in this as it was in starting
        assert time.monotonic() - sent_s < 2 * RANK_TIMEOUT_S + 2 * (sent_s - started_s)
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
    wait_until("12 steps are taken", lambda: steps(tmp_path) >= 12)
    lock = tmp_path / "run/lock.json"
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "token": "another"}))
    assert codes(group) == [ExitCode.FENCED]
    assert "another start has taken this run over" in log_of(tmp_path)
    assert json.loads(lock.read_text())["token"] == "another"
