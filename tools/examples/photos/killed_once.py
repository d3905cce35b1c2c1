"""Runs a training command, kills it once with SIGKILL when work would be lost by that, and runs it again to its end.

    command ... a checkpoint ... a logged step behind it --SIGKILL to all of its processes--> the same command again

`python -m tools.examples.photos.killed_once RUN/STAGE -- COMMAND ...`; RUN/STAGE/killed.json says when it was killed. A
stage that was killed in an earlier start of this command is not killed again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from models.common.errors import InputError, run_cli
from models.common.files import read_lines, write_json

RECORD = "killed.json"
POLL_S = 0.2


def main(argv: list[str]) -> int:
    """Run the command, killed once on the way; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.examples.photos.killed_once", description="Kill it once.")
    parser.add_argument("stage", type=Path, help="the stage's directory, RUN/STAGE")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="behind --")
    arguments = parser.parse_args(argv)
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise InputError("a training command is needed behind --")
    if not (arguments.stage / RECORD).is_file():
        status = _run(command, arguments.stage)
        if status is not None:
            return status
        print("killed; the same command again", flush=True)
    status = _run(command, None)
    assert status is not None
    return status


def _run(command: Sequence[str], killed_in: Path | None) -> int | None:
    """The command's exit code; None where it was killed, which only happens with a stage's directory `killed_in`."""
    import trainer.checkpoint.format  # noqa: F401 - takes seconds, in which a short stage would be over

    process = subprocess.Popen(command, start_new_session=True)

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        _signal(process, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while killed_in is not None and process.poll() is None:
            moment = moment_to_kill(killed_in)
            if moment is not None:
                _signal(process, signal.SIGKILL)
                process.wait()
                write_json(killed_in / RECORD, moment)
                return None
            time.sleep(POLL_S)
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to every process of the command's session: launcher and ranks."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def moment_to_kill(stage: Path) -> dict[str, int] | None:
    """Its newest checkpoint's step and a later one that was logged, {checkpoint, step}; None where one is missing."""
    from trainer.checkpoint.format import checkpoints_in, step_of

    saved = [step_of(path.name) for path in checkpoints_in(stage / "checkpoints")]
    logged = [int(row["step"]) for row in read_lines(stage / "metrics.jsonl") if "step" in row]
    if not saved or not logged or max(logged) <= max(saved) or (stage / "finished.json").is_file():
        return None
    return {"checkpoint": max(saved), "step": max(logged)}


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
