"""A full disk under a rank's log costs lines, not the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.paths import REPOSITORY

FULL = Path("/dev/full")
"""A device of Linux on which no byte finds room."""


def test_a_full_disk_does_not_end_what_prints() -> None:
    program = "from trainer.printing import be_patient; be_patient(); print('a line', flush=True); raise SystemExit(75)"
    with FULL.open("w") as full:
        words = [sys.executable, "-u", "-c", program]
        done = subprocess.run(words, cwd=REPOSITORY, stdout=full, stderr=full, timeout=60, check=False)
    assert done.returncode == 75
