"""A rank's console output: which records are shown, their format, and tolerance of a full disk.

How a module of the trainer logs:

    logger = logging.getLogger(__name__)  # in trainer/main.py, which runs as a script, "trainer.main"

    logger.info("...")     what the run does; call it on every rank, the first rank shows it
    logger.warning("...")  shown by the rank that calls it; where every rank finds the same, `if ranks.is_first:` first
    logger.error("...")    why this process ends

    console                 going on from runs/x/align/checkpoints/step_000500
                            warning: runs/x/align/events.jsonl: No space left on device
    with SIGHTLINE_LOG=full 2026-11-28 21:30:05 rank 0 info: going on from runs/x/align/checkpoints/step_000500
                            2026-11-28 21:31:40 rank 0 warning: runs/x/align/events.jsonl: No space left on device

Records go to stdout: under Slurm that is a file for each rank, often on the disk that the checkpoints fill. The
progress line is no record; it is rewritten in place on stderr (`trainer.tracking.tracker`).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, Literal, TextIO

from models.common.errors import InputError

PACKAGES = ("trainer", "data_pipeline", "models")
"""Whose records the console shows. Libraries keep their own handlers and levels."""

FORMAT_VARIABLE = "SIGHTLINE_LOG"

ConsoleFormat = Literal["plain", "full"]


class ConsoleFormatter(logging.Formatter):
    """A record as a line: `text`, `warning: text`, or the same after time, rank and level."""

    def __init__(self, rank: int, form: ConsoleFormat) -> None:
        super().__init__("%(message)s", datefmt="%Y-%m-%d %H:%M:%S")
        self._rank, self._form = rank, form

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        """The line without the traceback that `logging` may put below it."""
        level = record.levelname.lower()
        if self._form == "full":
            return f"{self.formatTime(record, self.datefmt)} rank {self._rank} {level}: {record.message}"
        return record.message if record.levelno <= logging.INFO else f"{level}: {record.message}"


class ConsoleHandler(logging.Handler):
    """Writes to whatever `sys.stdout` is when the record comes, and flushes: a process may be killed after any line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record. If the stream fails (a full disk, a closed pipe), only this record is lost."""
        try:
            sys.stdout.write(self.format(record) + "\n")
            sys.stdout.flush()
        except OSError:
            return
        except Exception:
            self.handleError(record)


def set_up_logging(rank: int = 0, environment: Mapping[str, str] = os.environ) -> None:
    """Show this project's records on the console; called by entry points only. A second call replaces the first.

    Raises:
        InputError: SIGHTLINE_LOG is neither `plain` (the default) nor `full`.
    """
    handler = ConsoleHandler(logging.INFO if rank == 0 else logging.WARNING)
    handler.setFormatter(ConsoleFormatter(rank, _read_format(environment)))
    for name in PACKAGES:
        logger = logging.getLogger(name)
        for earlier in [each for each in logger.handlers if isinstance(each, ConsoleHandler)]:
            logger.removeHandler(earlier)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _read_format(environment: Mapping[str, str]) -> ConsoleFormat:
    match environment.get(FORMAT_VARIABLE, ""):
        case "" | "plain":
            return "plain"
        case "full":
            return "full"
        case other:
            raise InputError(f"{FORMAT_VARIABLE}: found {other!r} in the environment; allowed are plain and full")


class LossyStream:
    """A text stream that drops what cannot be written and raises nothing; all else is delegated to the stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`; the number of characters taken, those that were dropped included."""
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        """Flush the stream's buffer; what cannot be written stays in it for the next flush."""
        try:
            self._stream.flush()
        except OSError:
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tolerate_full_disk() -> None:
    """Let no `print`, of ours or of a library, end the process because stdout or stderr cannot be written."""
    sys.stdout = LossyStream(sys.stdout)
    sys.stderr = LossyStream(sys.stderr)
