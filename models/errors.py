"""What a person sees when an input is wrong: one line, an exit code, no traceback.

`InputError` is for what the user can mend (a file, a recipe, a command line). A bug of ours keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence

EXIT_INPUT_ERROR = 2
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""A disk that is full or may not be written to is the user's to mend; any other OSError is told in full."""


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do about it."""


def run_cli(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command's `main` and turn an `InputError`, or a full disk, into one line on stderr and exit code 2.

    `--debug`, anywhere on the line, shows the traceback instead; it is taken out before `main` sees the arguments.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return main(arguments)
    except InputError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_INPUT_ERROR
    except OSError as error:
        if debug or error.errno not in DISK_FAULTS:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}; make room, and start again", file=sys.stderr)
        return EXIT_INPUT_ERROR
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        return 130
