"""A worker that dies loses nothing, and a sample that kills workers is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.fetch import Fetcher, Result
from data_pipeline.sample import BadSample, Draw, Encoded
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow


class Deadly:
    """Kills its process at some draws: always at 5, and once at 2."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "died"

    def __call__(self, draw: Draw) -> Result:
        if draw.n == 5 or (draw.n == 2 and not self.mark.exists()):
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        ids = np.array([draw.n], dtype=np.int32)
        return Encoded(draw, *self.name_of(draw), ids, ids, np.zeros((0, 1, 1, 3), dtype=np.uint8))

    def name_of(self, draw: Draw) -> tuple[str, str]:
        return "a.tar", f"key{draw.n}"


def test_a_killed_worker_loses_no_sample(tmp_path: Path) -> None:
    fetcher = Fetcher(Deadly(tmp_path), num_workers=2)
    draws = [Draw(0, n) for n in range(10)]
    for draw in draws:
        fetcher.prefetch(draw)
    results = [fetcher.result(draw) for draw in draws]
    fetcher.close()
    assert [result.draw.n for result in results] == list(range(10))
    bad = [result for result in results if isinstance(result, BadSample)]
    assert [(result.draw.n, result.shard, result.key) for result in bad] == [(5, "a.tar", "key5")]
    assert "died on this sample" in bad[0].reason


PROGRAM = """
import os, sys, time
from data_pipeline.fetch import Fetcher
from data_pipeline.sample import Draw
from tests.data_pipeline.test_fetch import tell_pid
if __name__ == "__main__":
    fetcher = Fetcher(tell_pid, num_workers=2)
    print(fetcher.result(Draw(0, 0)).reason, flush=True)
    time.sleep(60)
"""


def tell_pid(draw: Draw) -> Result:
    return BadSample(draw, "", "", str(os.getpid()))


def test_workers_end_when_the_main_process_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    main = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert main.stdout is not None
    worker = int(main.stdout.readline())
    os.kill(worker, signal.SIGUSR1)  # Slurm's warning must not end a worker
    os.kill(worker, signal.SIGINT)
    time.sleep(0.5)
    os.kill(worker, 0)
    main.kill()
    main.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
