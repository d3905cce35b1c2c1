"""A rank fails while the others stand in a collective and hear nothing, as under NCCL, on the real Slurm.

The trainer is a stand-in; its watch, the job scripts and Slurm are the real ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.conftest import Checkout, copy_checkout
from tests.support.mini_slurm import MiniSlurm, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

TRAINER = """\
import os, pathlib, signal, sys, threading, time
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
from trainer.distributed.console import set_up_logging
from trainer.distributed.context import DistributedContext
from trainer.distributed.watchdog import Watchdog

rank = int(os.environ["SLURM_PROCID"])
set_up_logging(rank)
stage = pathlib.Path(os.environ["SIGHTLINE_STAGE"])
if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
    time.sleep(600)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python's handlers do not run inside CUDA
ranks = DistributedContext(rank, 3, 0)
watchdog = Watchdog(stage / "ranks", ranks, 900.0).start()
while len(list((stage / "ranks").glob("0*.jsonl"))) < 3:
    time.sleep(0.05)
time.sleep(0.5)
if rank == 1:
    {death}
{others}
threading.Event().wait()
"""

NCCL = (
    "print('[rank0]:[E] ProcessGroupNCCL.cpp:1 [Rank 0] Process group watchdog thread terminated with exception: NCCL "
    "error: remote process exited', flush=True); time.sleep(2); os.abort()"
)


@pytest.mark.parametrize(
    ("death", "others", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "", "rank 1 (node2) failed: ended with 139"),
        ("watchdog.tell_failure('ValueError: x', 76); os._exit(1)", "", "rank 1 (node2) failed: ValueError: x"),
        ("os._exit(1)", NCCL, ""),
    ],
    ids=["a signal", "an exception", "NCCL's watch"],
)
def test_the_node_that_failed_first_is_excluded_and_no_other(
    cluster: MiniSlurm, tmp_path: Path, death: str, others: str, told: str
) -> None:
    checkout = Checkout(copy_checkout(tmp_path / "checkout"), cluster)
    (checkout.folder / "trainer" / "main.py").write_text(TRAINER.format(death=death, others=others))
    cluster.wait_for_nodes("idle", *cluster.nodes)
    job = checkout.submit("--nodes=3 --nodelist=node[1-3] slurm/stage1.sh")
    wait_until(
        "it is queued again", lambda: "queues itself again" in checkout.log(job) if _has_log(checkout, job) else False
    )
    wait_until("the nodes are judged", lambda: "xcluded" in checkout.log(job))
    log = checkout.log(job)
    assert "ranks ended with" in log
    assert "node2" in log.rpartition("xcluded")[2]
    for name in ("node1", "node3"):
        assert name not in log.rpartition("xcluded")[2]
    rank = (checkout.folder / "runs/quickstart/align/logs/rank_00000.log").read_text()
    assert told in rank
    cluster.ask("scancel", job)
    wait_until("no process is left", lambda: not any(cluster.processes().values()))


def _has_log(checkout: Checkout, job: str) -> bool:
    return any((checkout.folder / "slurm" / "logs").glob(f"*-{job}.out"))
