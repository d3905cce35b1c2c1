"""Errors for the user: one line and an exit code, no traceback.

`InputError` is for what the user can correct (a file, a recipe, a command line). A bug of ours keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence

from models.common.exit_codes import ExitCode

DISK_FAULTS = {
    errno.ENOSPC: "make room, and start again",
    errno.EDQUOT: "make room, and start again",
    errno.EROFS: "make it writable, or take another directory",
    errno.EACCES: "make it readable and writable for this user, or take another directory",
    errno.EPERM: "make it readable and writable for this user, or take another directory",
    errno.ENOTDIR: "a part of this path is a file; take another one",
    errno.ELOOP: "its symbolic links go in a circle; take another path",
    errno.ENAMETOOLONG: "take a shorter path",
    errno.ESTALE: "its server was started again under it; start again",
    errno.EIO: "the disk or its server fails; look at the system's log, and take another one",
}
"""Disk errors that the user can correct, and how; any other OSError keeps its traceback."""


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do about it."""

    is_said = False
    """Whether the line was printed where it was found, and needs no saying at the command's end."""


class AwayError(Exception):
    """What a command reads from is away: nobody's input is to blame, and the same command works when it is back.

    The message is one line. Not an `InputError`, which may cost a sample that is not at fault.
    """

    is_said = False
    """See `InputError`."""


def single_line(error: BaseException, max_length: int = 300) -> str:
    """A library's error as part of our one-line message: without line breaks, shortened, and never empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


def user_message(error: InputError | AwayError | OSError) -> str | None:
    """The one-line message of an error that the user can correct; None for any other, which keeps its traceback."""
    if isinstance(error, InputError | AwayError):
        return str(error)
    advice = DISK_FAULTS.get(error.errno or 0)
    return f"{error.filename or 'a file'}: {error.strerror}; {advice}" if advice is not None else None


def run_cli(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command's `main`; an `InputError` or a disk error becomes one line on stderr and exit code 2.

    An `AwayError` becomes one line and the exit code that asks for another start.

    `--debug`, anywhere on the line, shows the traceback instead; it is removed before `main` gets the arguments.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return main(arguments)
    except (InputError, AwayError, OSError) as error:
        line = user_message(error)
        if debug or line is None:
            raise
        if not getattr(error, "is_said", False):
            print("error: " + line.replace("\n", "\\n"), file=sys.stderr)  # a name may hold one
        return ExitCode.REQUEUE if isinstance(error, AwayError) else ExitCode.INPUT_ERROR
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        return ExitCode.KEYBOARD
