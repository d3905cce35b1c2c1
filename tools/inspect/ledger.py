"""`sightline ledger RUN`: the lines of a run's ledger as JSON, one for each rank and global batch.

    {"batch": 7, "step": 7, "draws": [[0, 6], [1, 6]], "left_out": [], "loss": 2.31, "attempt": 1, "rank": 0}

Reads what is there, whether it counts or not; `sightline audit` says what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.common.errors import run_cli
from tools.inspect.stages import choose_stage


def main(argv: list[str]) -> int:
    """Print the lines of a stage's ledger, restart by restart and rank by rank; returns 0."""
    parser = argparse.ArgumentParser(prog="sightline ledger", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's directory")
    parser.add_argument("--stage", help="the stage, where the run has several")
    parser.add_argument("--batch", type=int, help="one global batch alone")
    arguments = parser.parse_args(argv)
    stage = choose_stage(arguments.run, arguments.stage)
    try:
        for line in lines(arguments.run / stage / "ledger", arguments.batch):
            print(json.dumps(line))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def lines(root: Path, batch: int | None) -> Iterator[dict[str, Any]]:
    """The lines in a stage's `ledger` directory, each with its restart and rank.

    Args:
        batch: one global batch alone; None: all.
    """
    from trainer.ledger.restarts import FOLDER, blocks_of, restart_number

    for directory in sorted((path for path in root.glob(f"{FOLDER}*") if restart_number(path)), key=restart_number):
        for file in sorted(directory.glob("rank_*")):
            rank = int(file.stem.removeprefix("rank_"))
            for block in blocks_of(file):
                if batch is None or (block.batch == batch).any():
                    for line in block.lines():
                        if batch in (None, line["batch"]):
                            yield {**line, "attempt": restart_number(directory), "rank": rank}


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
