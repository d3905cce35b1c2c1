"""What the first rank that fails says to the others, in a file: under NCCL nothing else reaches them.

    failing rank   exception -> message -> RUN/STAGE/ranks/failed.json -> teardown
    other ranks    in a collective, inside CUDA ... their watchdog's thread finds the file -> the same line -> exit

gloo's connections break when a process ends, so its peers raise. NCCL's kernels wait on the device instead, and over
NVLink for ever: without this each of them would stand there for `guard.rank_timeout_s`. slurm/launch.sh writes the same
file for a rank that died of a signal.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from models.common.documents import parse
from models.common.errors import InputError
from models.common.files import write_text

FILE = "failed.json"


@dataclass(frozen=True)
class Failure:
    """The end of one rank, as the others need it."""

    rank: int
    host: str
    code: int
    """What the others end with: 2 where a person has to correct something, 75 where what is read is away, else 76."""
    line: str


class FailureNotice:
    """The notice of one start of a stage.

    Args:
        directory: RUN/STAGE/ranks.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / FILE
        self._of_earlier_start = ""

    def open(self) -> None:
        """Pass over what an earlier start has left."""
        self._of_earlier_start = self._content()

    def tell(self, failure: Failure) -> None:
        """Write it, unless another rank of this start was first. A disk that refuses costs the notice only."""
        if self.read() is not None:
            return
        try:
            write_text(self._file, json.dumps({**asdict(failure), "told_s": time.time()}))
        except OSError:
            return

    def read(self) -> Failure | None:
        """What a rank of this start has told; None where none has."""
        content = self._content()
        if not content or content == self._of_earlier_start:
            return None
        try:
            value = parse(content, "a rank's notice")
            return Failure(int(value["rank"]), str(value["host"]), int(value["code"]), str(value["line"]))
        except (InputError, ValueError, KeyError, TypeError):
            return None

    def _content(self) -> str:
        try:
            return self._file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""
