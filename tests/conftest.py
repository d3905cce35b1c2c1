"""Fixtures that several packages' tests share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share the machine; torch reads it when it is imported

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY
from tests.support.quickstart import TINY
from tools.quickstart.runner import Runner
from tools.quickstart.steps import plan

LONG_FIRST = ("slurm", "quickstart", "test_loop.py", "test_equivalence.py", "test_processes.py", "test_chaos.py")
"""Groups of tests that several processes begin with, so that none is left alone with a long one at the end."""

WORLD_STEPS = ("world", "clip", "language", "shards align", "shards lora")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process runs a file's tests, all of the cluster's, or all of the quickstart's: they share what they made."""
    groups = {item: _group(item) for item in items}
    items.sort(key=lambda item: LONG_FIRST.index(groups[item]) if groups[item] in LONG_FIRST else len(LONG_FIRST))
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))


def _group(item: pytest.Item) -> str:
    if "slurm" in item.keywords:
        return "slurm"
    return "quickstart" if "quickstart_world" in getattr(item, "fixturenames", ()) else item.path.name


@pytest.fixture(scope="session")
def quickstart_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny quickstart after its first steps: what it trains on, and nothing trained."""
    run = tmp_path_factory.mktemp("quickstart") / "run"
    run.mkdir()
    before = Path.cwd()
    os.chdir(REPOSITORY)
    try:
        Runner(run, [step for step in plan(run, TINY, 0) if step.name in WORLD_STEPS]).run()
    finally:
        os.chdir(before)
    return run


@pytest.fixture(scope="session")
def quickstart_run(quickstart_world: Path) -> Path:
    """The directory of a tiny quickstart, every step of it run by the real commands."""
    run = quickstart_world
    command = [sys.executable, "-m", "tools.quickstart", "--run", str(run), "--sizes", TINY.model_dump_json()]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (run / "stdout.txt").write_text(done.stdout)
    return run
