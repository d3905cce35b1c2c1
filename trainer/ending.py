"""How a process of a run ends after an error: first the message, then the teardown, both in bounded time.

A teardown may wait for ever: NCCL's destroys a communicator whose other ranks stand in a collective, a thread writes to
a disk that hangs. A message that comes after it is never read.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from models.common.errors import AwayError, InputError, user_message
from models.common.exit_codes import ExitCode
from trainer.distributed.running_time import RunningTime

TEARDOWN_S = 60.0
"""For writers' threads, the lock, DeepSpeed and the process group to end; nothing of it is needed to resume."""

_POLL_S = 0.25


def exit_code_of(error: BaseException) -> int:
    """What a process that ends with this error exits with."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.KEYBOARD
    if isinstance(error, AwayError):
        return ExitCode.REQUEUE
    is_users = isinstance(error, InputError | OSError) and user_message(error) is not None
    return ExitCode.INPUT_ERROR if is_users else 1


def line_of(error: BaseException) -> str:
    """One line for the other ranks: the user's message, or type and text."""
    line = user_message(error) if isinstance(error, InputError | AwayError | OSError) else None
    text = " ".join(str(error).split())
    return line or f"{type(error).__name__}: {text}"[:300]


def say_now(error: BaseException) -> None:
    """Print an error where it was found: one line where the user can correct it, else the traceback. Once only."""
    if isinstance(error, SystemExit | KeyboardInterrupt) or getattr(error, "is_said", False):
        return
    with suppress(OSError):
        if exit_code_of(error) in (ExitCode.INPUT_ERROR, ExitCode.REQUEUE):
            print(f"error: {line_of(error)}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error, file=sys.stderr)
            sys.stderr.flush()
    error.is_said = True  # type: ignore[attr-defined]


@contextmanager
def limited_teardown(code: int, limit_s: float = TEARDOWN_S) -> Iterator[None]:
    """End the process with `code` where the block takes longer than `limit_s` of the process's own running time."""
    is_over = threading.Event()

    def watch() -> None:
        running = RunningTime(2 * _POLL_S)
        while not is_over.wait(_POLL_S):
            if running.seconds() > limit_s and not is_over.is_set():
                os._exit(code)

    threading.Thread(target=watch, name="teardown", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
