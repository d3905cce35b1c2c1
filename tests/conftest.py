"""Fixtures that several packages' tests share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY
from tests.support.quickstart import TINY


@pytest.fixture(scope="session")
def quickstart_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny quickstart, every step of it run by the real commands."""
    run = tmp_path_factory.mktemp("quickstart") / "run"
    command = [sys.executable, "-m", "tools.quickstart", "--run", str(run), "--sizes", TINY.model_dump_json()]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (run / "stdout.txt").write_text(done.stdout)
    return run
