"""Where restarting ends: a stand-in for the trainer that always fails, on the real Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.conftest import Checkout, copy_checkout
from tests.support.mini_slurm import MiniSlurm, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

FAILS = "import time; time.sleep(1); print('broken', flush=True); raise SystemExit(1)\n"


@pytest.mark.parametrize(
    ("bound", "num_restarts", "told"),
    [
        ("SIGHTLINE_MAX_IDLE=1", 2, "stopped: 2 starts in a row came no further than nothing"),
        ("SIGHTLINE_MAX_RESTARTS=1", 1, "after 1 restarts, which is as many as are allowed"),
    ],
)
def test_a_run_that_gets_nowhere_stops_and_releases_nothing(
    cluster: MiniSlurm, tmp_path: Path, bound: str, num_restarts: int, told: str
) -> None:
    checkout = Checkout(copy_checkout(tmp_path / "checkout"), cluster)
    (checkout.folder / "trainer" / "main.py").write_text(FAILS)
    with (checkout.folder / "slurm" / "site.env").open("a") as site:
        site.write(f"{bound}\n")
    job = checkout.submit("--nodes=2 slurm/stage1.sh")
    after = checkout.submit(f"--dependency=afterok:{job} --kill-on-invalid-dep=yes slurm/stage2.sh")
    pointer = checkout.folder / "slurm" / "logs" / f"job-{job}"
    wait_until("the job has its copy", pointer.exists)
    (checkout.folder / "trainer" / "main.py").write_text("")  # editing disturbs nothing: the job runs its copy
    for restarts in range(1, num_restarts + 1):
        cluster.start_now(job, restarts)
    cluster.wait_for(job, "FAILED")
    cluster.wait_for(after, "CANCELLED")
    assert told in checkout.log(job)
    log = checkout.folder / "runs" / "quickstart" / "align" / "logs" / "rank_00001.log"
    assert log.read_text(encoding="utf-8", errors="replace").count("broken") == 2
    wait_until("no process is left", lambda: not any(cluster.processes().values()))
