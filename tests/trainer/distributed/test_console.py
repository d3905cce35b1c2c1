"""Records become console lines, from the ranks that should print them; a full disk costs lines."""

from __future__ import annotations

import errno
import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.common.errors import InputError
from tests.support.paths import REPOSITORY
from trainer.distributed.console import PACKAGES, ConsoleHandler, LossyStream, set_up_logging

FULL = Path("/dev/full")
"""A device of Linux on which no byte finds room."""

logger = logging.getLogger("trainer.some_module")


@pytest.fixture(autouse=True)
def _no_handler_stays() -> Iterator[None]:
    yield
    for name in PACKAGES:
        packages_logger = logging.getLogger(name)
        packages_logger.setLevel(logging.NOTSET)
        for handler in [each for each in packages_logger.handlers if isinstance(each, ConsoleHandler)]:
            packages_logger.removeHandler(handler)


def say_something() -> None:
    logger.debug("of no interest")
    logger.info("100 % done")
    logger.warning("no space")
    logger.error("rank 1 is lost")


def test_the_first_rank_shows_everything_and_the_others_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0, {})
    say_something()
    assert capsys.readouterr().out == "100 % done\nwarning: no space\nerror: rank 1 is lost\n"
    set_up_logging(3, {})  # replaces the first: no line comes twice
    say_something()
    captured = capsys.readouterr()
    assert captured.out == "warning: no space\nerror: rank 1 is lost\n"
    assert captured.err == ""


def test_time_rank_and_level_stand_before_each_line_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0, {"SIGHTLINE_LOG": "full"})
    say_something()
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{time} rank 0 info: 100 % done", lines[0])
    assert re.fullmatch(rf"{time} rank 0 warning: no space", lines[1])
    with pytest.raises(InputError, match=r"SIGHTLINE_LOG: found 'loud'.*plain and full"):
        set_up_logging(0, {"SIGHTLINE_LOG": "loud"})


def test_libraries_keep_their_own_say(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0, {})
    logging.getLogger("transformers").info("loaded")
    assert capsys.readouterr().out == ""


class FullDisk(io.StringIO):
    """A stream whose disk has no room."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        self.write("")


def test_a_stream_that_cannot_be_written_costs_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging(0, {})
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", FullDisk())
        say_something()
        patch.setattr(sys, "stdout", LossyStream(FullDisk()))
        print("a library's own", flush=True)
    assert capsys.readouterr() == ("", "")  # no traceback of the handler either


def test_a_full_disk_does_not_change_an_exit_code() -> None:
    program = (
        "import logging; from trainer.distributed.console import set_up_logging, tolerate_full_disk; "
        "tolerate_full_disk(); set_up_logging(); logging.getLogger('trainer').info('a record'); "
        "print('a line', flush=True); raise SystemExit(75)"
    )
    with FULL.open("w") as full:
        words = [sys.executable, "-u", "-c", program]
        done = subprocess.run(words, cwd=REPOSITORY, stdout=full, stderr=full, check=False)
    assert done.returncode == 75
