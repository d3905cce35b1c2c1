"""A worker that dies loses nothing, and a sample that kills workers is named."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.fetch import Fetcher, Result
from data_pipeline.sample import BadSample, Draw, Encoded

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
        return Encoded(draw, "s", str(draw.n), ids, ids, np.zeros((0, 1, 1, 3), dtype=np.uint8))


def test_a_killed_worker_loses_no_sample(tmp_path: Path) -> None:
    fetcher = Fetcher(Deadly(tmp_path), num_workers=2)
    draws = [Draw(0, n) for n in range(10)]
    for draw in draws:
        fetcher.prefetch(draw)
    results = [fetcher.result(draw) for draw in draws]
    fetcher.close()
    assert [result.draw.n for result in results] == list(range(10))
    bad = [result for result in results if isinstance(result, BadSample)]
    assert [result.draw.n for result in bad] == [5]
    assert "died on this sample" in bad[0].reason
