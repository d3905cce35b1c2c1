"""Output that a full disk does not turn into a failure: a line of a log is lost, not the run.

Under Slurm a rank's output is a file, often on the disk that the checkpoints fill. Owns the two standard streams only.
"""

from __future__ import annotations

import sys
from typing import Any, TextIO


class Patient:
    """A text stream that loses what cannot be written; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or lose it."""
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        """Flush what the stream holds back; what cannot be written stays there for the next time."""
        try:
            self._stream.flush()
        except OSError:
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def be_patient() -> None:
    """Print patiently from here on."""
    sys.stdout = Patient(sys.stdout)
    sys.stderr = Patient(sys.stderr)
