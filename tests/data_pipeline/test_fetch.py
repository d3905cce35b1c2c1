"""A worker that dies loses nothing, and a sample that kills workers is named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.fetch import Fetcher, Result
from data_pipeline.sample import BadSample, Encoded, SampleRef
from tests.support.paths import REPOSITORY
from tests.support.patience import GUARD_S, wait_until
from tests.support.samples import ref

pytestmark = pytest.mark.slow


class Deadly:
    """Kills its process at draw 5 always, and at draw 2 once: while another worker is busy with draw 3 for a minute."""

    def __init__(self, folder: Path) -> None:
        self.died, self.busy = folder / "died", folder / "busy"

    def __call__(self, sample: SampleRef) -> Result:
        if sample.n == 3 and not self.busy.exists():
            self.busy.touch()
            time.sleep(86400)
        if sample.n == 5 or (sample.n == 2 and not self.died.exists()):
            self.died.touch()
            wait_until("the other is busy", self.busy.exists)
            os.kill(os.getpid(), signal.SIGKILL)
        ids = np.array([sample.n], dtype=np.int32)
        return Encoded(sample, ids, ids, np.zeros((0, 1, 1, 3), dtype=np.uint8))


def test_a_killed_worker_loses_no_sample(tmp_path: Path) -> None:
    fetcher = Fetcher(Deadly(tmp_path), num_workers=2)
    draws = [ref(n) for n in range(10)]
    for draw in draws:
        fetcher.prefetch(draw)
    results = [fetcher.result(draw) for draw in draws]
    fetcher.close()
    assert [result.ref.n for result in results] == list(range(10))
    bad = [result for result in results if isinstance(result, BadSample)]
    assert [(result.ref.n, result.ref.shard, result.ref.key) for result in bad] == [(5, "s.tar", "5")]
    assert "died on this sample" in bad[0].reason
    wait_until("no worker is left", lambda: not multiprocessing.active_children())  # the busy one too


JOB_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

PROGRAM = """
import signal, sys
from data_pipeline.fetch import Fetcher
from tests.support.samples import ref
from tests.data_pipeline.test_fetch import JOB_SIGNALS, echo
if __name__ == "__main__":
    for number in JOB_SIGNALS:
        signal.signal(number, lambda *_: None)
    fetcher = Fetcher(echo, num_workers=2)
    fetcher.prefetch(ref(0))
    fetcher.prefetch(ref(1))
    for n, line in enumerate(sys.stdin):
        print(fetcher.result(ref(n)).reason, flush=True)
    fetcher.close()
"""


def echo(sample: SampleRef) -> Result:
    return BadSample(sample, f"draw {sample.n}")


@pytest.mark.parametrize("end", ["told", "killed"])
def test_signals_to_the_whole_job_leave_workers_to_the_main_process(tmp_path: Path, end: str) -> None:
    """Slurm's scancel and warning, and the keyboard, reach every process: while workers start and while they work."""
    script = tmp_path / "run.py"
    script.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    pipe, log = subprocess.PIPE, tmp_path / "log"
    main = subprocess.Popen(
        [sys.executable, script],
        stdin=pipe,
        stdout=pipe,
        stderr=log.open("wb"),
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert main.stdin is not None
    assert main.stdout is not None
    wait_until("they have started", lambda: len(children_of(main.pid)) == 3)  # two workers, the tracker of semaphores
    children = children_of(main.pid)
    for n in range(2):  # the workers have just begun; later they wait
        for number in JOB_SIGNALS:
            os.killpg(main.pid, number)
        main.stdin.write("next\n")
        main.stdin.flush()
        assert main.stdout.readline() == f"draw {n}\n"
    assert children_of(main.pid) == children
    if end == "killed":
        main.kill()
    else:
        main.stdin.close()
    main.wait(timeout=GUARD_S)
    wait_until("the workers are gone", lambda: all(map(is_gone, children)))
    assert end == "killed" or log.read_text() == ""  # else the tracker says that it cleaned up


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def is_gone(pid: str) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
