"""A server of this project as a process of its own, until the test has seen enough of it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import warm
from tests.support.paths import REPOSITORY

SLOW_MODEL = """
import sys, time
import models.opening
from models.opening import open_model
def slowly(*arguments):
    model = open_model(*arguments)
    before = model.forward
    def forward(*arguments, **options):
        time.sleep({pause_s})
        return before(*arguments, **options)
    model.forward = forward
    return model
models.opening.open_model = slowly
"""
"""The beginning of a program whose model takes its time for each step, as on a slow machine."""


@contextmanager
def served(program: str, words: list[str], folder: Path, says: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its address: the first group of the line of its output that `says` matches.

    What it says of errors comes to folder/log, and its temporary files to folder/tmp.
    """
    place = folder / "tmp"
    place.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(place)}
    command = [warm.python(), "-c", program, *words]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        found = next((found for line in process.stdout if (found := re.search(says, line.strip()))), None)
        assert found, (folder / "log").read_text()
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
