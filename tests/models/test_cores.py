"""Threads get their own cores, what they start gets all of them, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.common import cores
from tests.support.paths import REPOSITORY

SCRIPT = """
import os, threading, torch
from models.common import cores
before = cores.allowed()
whole = sorted(before)[:2]
torch.set_num_threads(2)
def masks():
    torch.ones(1 << 20).add_(1)  # a parallel region
    return sorted(tuple(sorted(os.sched_getaffinity(int(each)))) for each in os.listdir("/proc/self/task"))
def started(found):
    found += cores.allowed()
cores.bind(whole, 2)
assert cores.allowed() == {whole[0]}
assert (whole[1],) in masks(), masks()
assert not [each for each in masks() if not set(each) <= set(whole)]
found = []
with cores.unbound():
    thread = threading.Thread(target=started, args=(found,))
    thread.start()
thread.join()
assert sorted(found) == whole
assert cores.allowed() == {whole[0]}
assert torch.get_num_threads() == 2
cores.release(before)
assert set(masks()) == {tuple(sorted(before))}
"""


@pytest.mark.slow
@pytest.mark.skipif(len(cores.allowed()) < 2, reason="one core")
def test_each_thread_has_its_own_core_and_what_it_starts_has_all() -> None:
    """In a process of its own: masks are a process's state."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("OMP_NUM_THREADS", None)
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, env=environment)


def test_shares_are_contiguous_and_differ_by_one() -> None:
    assert [list(cores.share(range(7), place, 3)) for place in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]


def test_hyper_threads_of_a_core_stand_together(tmp_path: Path) -> None:
    """Two sockets of two cores with two threads each, numbered as Linux numbers them."""
    for core in range(8):
        facts = tmp_path / f"cpu{core}" / "topology"
        facts.mkdir(parents=True)
        (facts / "physical_package_id").write_text(f"{core // 2 % 2}\n")
        (facts / "core_id").write_text(f"{core % 2}\n")
    assert cores.in_order(range(8), tmp_path) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert cores.in_order([3, 1], tmp_path / "nothing") == [1, 3]


def test_the_narrowest_quota_above_counts(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/job/step\n")
    assert cores.quota(tmp_path, membership) is None
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "job" / "step" / "cpu.max").write_text("max 100000\n")
    assert cores.quota(tmp_path, membership) == 1.5
    (tmp_path / "cpu.cfs_quota_us").write_text("50000")
    (tmp_path / "cpu.cfs_period_us").write_text("100000")
    assert cores.quota(tmp_path, membership) == 0.5
