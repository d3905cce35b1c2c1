"""Answers on disk while a task is being asked, by any number of workers, and for as long as any of them may go on.

    OUT.NAME.ASKED.part-00001-of-00004.jsonl    {"asked", "facts"}, then {"start", "answers"} for each batch

Owns those files: who asks which batch, what is missing, and that all answers are there before they are scored. A batch
belongs to a worker by its number alone, so workers need not agree on anything; its answers are on the disk before the
next one is asked. The parts of other questions (`asked` differs) are never read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from typing_extensions import TypedDict

from eval.workers import Worker
from models.common.documents import check, parse
from models.common.errors import InputError
from models.common.files import LineFile, read_lines
from models.common.source import sha256_of

NUM_NAMED = 12
"""Characters of `asked` in a file's name."""


class _Batch(TypedDict):
    """A line of a part behind the first one."""

    start: int
    answers: list[Any]


class KeptAnswers:
    """The answers to one task's questions; nothing is opened before `missing` or `add`."""

    def __init__(self, out: Path, name: str, asked: str, num_samples: int, worker: Worker) -> None:
        self._out, self._name, self._asked, self._num_samples = out, name, asked, num_samples
        self._worker = worker
        self._lines: LineFile | None = None
        self._held: IO[bytes] | None = None
        self.facts: Mapping[str, Any] = {}
        """What moves numbers and is no part of `asked`; written at the head of this worker's part."""

    @property
    def path(self) -> Path:
        """This worker's part."""
        number, count = self._worker.rank, self._worker.count
        return self._out.with_name(
            f"{self._out.stem}.{self._name}.{self._asked[:NUM_NAMED]}.part-{number:05d}-of-{count:05d}.jsonl"
        )

    def read(self) -> dict[int, Any]:
        """The answers of all workers by place.

        Raises:
            InputError: two parts have different answers to one question.
        """
        found: dict[int, Any] = {}
        sources: dict[int, Path] = {}
        for path in self._parts():
            for line in self._lines_of(path):
                for place, answer in enumerate(line["answers"], start=line["start"]):
                    if place in found and found[place] != answer:
                        raise InputError(
                            f"{path} and {sources[place].name} have different answers to question {place + 1}: "
                            "remove one of them, and start again"
                        )
                    found[place], sources[place] = answer, path
        return found

    def _parts(self, asked: str | None = None) -> list[Path]:
        named = self._asked[:NUM_NAMED] if asked is None else asked
        return sorted(self._out.parent.glob(f"{_literal(self._out.stem)}.{_literal(self._name)}.{named}.part-*.jsonl"))

    def _lines_of(self, path: Path) -> list[Any]:
        """The batches of a part; none where another worker has just taken it away, all being scored."""
        try:
            lines = read_lines(path)
        except FileNotFoundError:
            return []
        is_ours = bool(lines) and isinstance(lines[0], dict) and lines[0].get("asked") == self._asked
        batches = [line for line in lines[1:] if isinstance(line, dict) and "start" in line] if is_ours else []
        return [check(line, _Batch, path, "remove that file") for line in batches]

    def missing(self, batch_size: int) -> Iterator[range]:
        """This worker's batches, each as far as nobody has answered it yet."""
        found = self.read()
        for start in range(self._worker.rank * batch_size, self._num_samples, self._worker.count * batch_size):
            batch = range(start, min(start + batch_size, self._num_samples))
            for is_found, places in groupby(batch, found.__contains__):
                if not is_found:
                    run = list(places)
                    yield range(run[0], run[-1] + 1)

    def add(self, places: range, answers: list[Any]) -> None:
        """Write the answers of one batch; they are on the disk on return.

        Raises:
            InputError: another process writes this worker's part.
            OSError: the disk is full.
        """
        if self._lines is None:
            self._open()
        assert self._lines is not None
        self._lines.write({"start": places.start, "answers": answers})
        self._lines.sync()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._held = self.path.open("ab+")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.path.name} is being written by another process: two workers have rank {self._worker.rank} of "
                f"{self._worker.count}; start them by torchrun, srun or an array job"
            ) from None
        except OSError:
            pass  # a file system without locks
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            self._held.write(b"\n")  # what a killed process wrote last
            self._held.flush()
        self._lines = LineFile(self.path)
        if not read_lines(self.path):
            self._lines.write({"asked": self._asked, "facts": dict(self.facts)})

    def all(self) -> list[Any] | None:
        """The answers to all questions in their order; None while some are missing."""
        found = self.read()
        return [found[place] for place in range(self._num_samples)] if len(found) == self._num_samples else None

    def count(self) -> int:
        """How many questions have an answer."""
        return len(self.read())

    def all_facts(self) -> list[Any]:
        """The different facts of the parts."""
        heads = [lines[0].get("facts", {}) for path in self._parts() if (lines := read_lines(path))]
        return [parse(text, self._name) for text in sorted({json.dumps(head, sort_keys=True) for head in heads})]

    def remove(self) -> None:
        """Take all parts away, of other questions too: what is right is in the results."""
        if self._lines is not None:
            self._lines.close()
        if self._held is not None:
            self._held.close()
        for path in self._parts("*"):
            path.unlink(missing_ok=True)


def _literal(name: str) -> str:
    """A name in a glob as it is."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def asked_id(facts: Mapping[str, Any], model: Path) -> str:
    """The id of what was asked: a task's questions, pictures and decoding, and the bundle (with its template)."""
    manifest = model / "sightline.json"
    files = [manifest] if manifest.is_file() else sorted(path for path in model.glob("*") if path.is_file())
    digests = [sha256_of(path) for path in files]
    return hashlib.sha256(json.dumps({"model": digests, **facts}, sort_keys=True).encode()).hexdigest()
