"""Wrong input is one line and exit code 2; a bug keeps its traceback."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from models.common.errors import AwayError, InputError, run_cli, single_line
from models.common.exit_codes import ExitCode


def failing(error: BaseException) -> Callable[[list[str]], int]:
    def main(_: list[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("a.yaml: no such file"), "error: a.yaml: no such file"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: a file: No space left on device; make room, and"),
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), "error: runs/x: Read-only file system; make it"),
        (OSError(errno.EACCES, "Permission denied", "runs/x"), "error: runs/x: Permission denied; make it readable"),
        (OSError(errno.EPERM, "Operation not permitted", "runs/x"), "error: runs/x: Operation not permitted; make it"),
        (
            OSError(errno.ENOTDIR, "Not a directory", "a/b"),
            "error: a/b: Not a directory; a part of this path",
        ),
        (OSError(errno.ESTALE, "Stale file handle", "a"), "error: a: Stale file handle; its server was started again"),
        (OSError(errno.EIO, "Input/output error", "a"), "error: a: Input/output error; the disk or its server fails"),
    ],
)
def test_what_a_person_can_mend_is_one_line(capsys: pytest.CaptureFixture[str], error: Exception, line: str) -> None:
    assert run_cli(failing(error), []) == ExitCode.INPUT_ERROR
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(line)
    assert told.err.count("\n") == 1
    with pytest.raises(type(error)):
        run_cli(failing(error), ["--debug"])


@pytest.mark.parametrize(
    "error", [OSError(errno.EBADF, "Bad file descriptor"), FileNotFoundError("x"), ValueError("x")]
)
def test_what_is_ours_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_cli(failing(error), [])


def test_ctrl_c_ends_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(failing(KeyboardInterrupt()), []) == ExitCode.KEYBOARD
    assert capsys.readouterr().err == "stopped by the keyboard\n"


def test_debug_is_taken_out_wherever_it_stands() -> None:
    seen: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        seen.append(arguments)
        return ExitCode.FINISHED

    assert run_cli(main, ["--debug", "a", "b"]) == run_cli(main, ["a", "--debug", "b"]) == 0
    assert seen == [["a", "b"], ["a", "b"]]


def test_an_error_of_a_library_becomes_a_line() -> None:
    assert single_line(ValueError("first\n  second\n")) == "first second"
    assert single_line(KeyError()) == "KeyError"
    assert single_line(ValueError("x" * 500), max_length=10) == "xxxxxxx..."


def test_what_is_away_is_one_line_and_asks_for_another_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(failing(AwayError("https://host/set has been away")), []) == ExitCode.REQUEUE
    assert capsys.readouterr().err == "error: https://host/set has been away\n"
