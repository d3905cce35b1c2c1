"""Fixtures that several packages' tests share."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share the machine; torch reads it when it is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where the ranks of a test train; DeepSpeed reads it at its import

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.support.paths import REPOSITORY

GROUPS = {
    "tests/slurm/test_training.py": "the cluster",
    "tests/slurm/test_bounds.py": "the cluster",
    "tests/tools/examples/test_quickstart.py": "the quickstart",
    "tests/tools/export/test_opening.py": "the quickstart",
}
"""Files that one process runs, since they share what takes long to make."""

LONG_FIRST = ("test_loop_runs.py", "test_equivalence.py", "test_processes.py", "chaos/test_main.py")
"""Files that several processes begin with, so that none is left alone with a long one at the end."""

WORLD_STEPS = ("world", "clip", "language", "shards align", "shards lora")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    items.sort(key=lambda item: not (_group(item.nodeid) or str(item.path).endswith(LONG_FIRST)))


def _group(nodeid: str) -> str:
    return next((group for beginning, group in GROUPS.items() if nodeid.startswith(beginning)), "")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs all tests of a file, and of the files of a group."""
    from xdist.scheduler import LoadScopeScheduling

    class BySharing(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid) or nodeid.split("::", maxsplit=1)[0]

    return BySharing(config, log)


@pytest.fixture(scope="session")
def quickstart_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny quickstart after its first steps: what it trains on, and nothing trained."""
    from tests.support import warm
    from tests.support.quickstart import TINY
    from tools.examples.quickstart.runner import Runner
    from tools.examples.quickstart.steps import plan

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each process has a folder of its own in there
        shared = shared.parent
    run, before = shared / "quickstart", Path.cwd()
    run.mkdir(exist_ok=True)
    os.chdir(REPOSITORY)
    try:
        with FileLock(shared / "quickstart.lock"), warm.as_executable():  # the second process finds it done
            Runner(run, [step for step in plan(run, TINY, 0) if step.name in WORLD_STEPS]).run()
    finally:
        os.chdir(before)
    return run


@pytest.fixture(scope="session")
def quickstart_run(quickstart_world: Path) -> Path:
    """The directory of a tiny quickstart, every step of it run by the real commands."""
    from tests.support import warm
    from tests.support.quickstart import TINY

    run = quickstart_world
    command = [warm.python(), "-m", "tools.quickstart", "--run", str(run), "--sizes", TINY.model_dump_json()]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (run / "stdout.txt").write_text(done.stdout)
    return run


@pytest.fixture(autouse=True)
def no_process_group_stays() -> Iterator[None]:
    """A test that joins a process group leaves it; left for it here, so that no other test of this process fails."""
    yield
    distributed = sys.modules.get("torch.distributed")
    stayed = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if distributed is not None and stayed:
        distributed.destroy_process_group()
    assert not stayed, "the test joined a process group and did not leave it"


@pytest.fixture(scope="module", autouse=True)
def kept_out_of_collections() -> None:
    """What is imported by now is looked at by no later garbage collection, which it would slow down.

    What earlier tests left behind is collected first, which is quick, for what they began with is kept out.
    """
    gc.collect()
    gc.freeze()
