"""The first failure of a start reaches ranks that hear nothing else; an earlier start's is passed over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.common.exit_codes import ExitCode
from tests.support.paths import REPOSITORY
from trainer.distributed.failure_notice import FILE, Failure, FailureNotice


def test_the_first_of_a_start_stays_and_an_earlier_start_s_is_none(tmp_path: Path) -> None:
    first, second = FailureNotice(tmp_path), FailureNotice(tmp_path)
    first.open()
    second.open()
    assert second.read() is None
    first.tell(Failure(3, "node7", 76, "ValueError: x"))
    second.tell(Failure(4, "node8", 76, "died of it"))
    assert second.read() == Failure(3, "node7", 76, "ValueError: x")
    later = FailureNotice(tmp_path)
    later.open()
    assert later.read() is None
    later.tell(Failure(3, "node7", 76, "ValueError: x"))
    assert later.read() == Failure(3, "node7", 76, "ValueError: x"), "the same again is this start's"
    (tmp_path / FILE).write_text('{"rank": ')
    assert later.read() is None
    FailureNotice(tmp_path / "nowhere").tell(Failure(0, "", 76, ""))  # a disk that refuses ends nothing


PROGRAM = """
import pathlib, signal, sys, threading
from trainer.distributed.console import set_up_logging
from trainer.distributed.context import DistributedContext
from trainer.distributed.watchdog import Watchdog
set_up_logging()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
watchdog = Watchdog(pathlib.Path(sys.argv[1]), DistributedContext(0, 2), timeout_s=3600)
watchdog.interval_s = 0.05
watchdog.start()
print("deaf", flush=True)
threading.Event().wait()  # as in a collective that never ends
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (ExitCode.LOST_RANK, "error: rank 0: rank 3 (node7) failed: ended with 139; the last checkpoint stands"),
        (ExitCode.INPUT_ERROR, "error: ended with 139\n"),
    ],
)
def test_a_rank_that_waits_for_ever_ends_with_the_line_of_the_one_that_failed(
    tmp_path: Path, code: int, said: str
) -> None:
    (tmp_path / FILE).write_text(json.dumps({"rank": 1, "host": "before", "code": 76, "line": "of another start"}))
    deaf = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert deaf.stdout is not None
    assert deaf.stdout.readline() == "deaf\n"
    # what slurm/launch.sh writes
    (tmp_path / FILE).write_text(f'{{"rank": 3, "host": "node7", "code": {int(code)}, "line": "ended with 139"}}\n')
    told, _ = deaf.communicate()
    assert deaf.returncode == code
    assert told.startswith(said)
