"""What the processes of one machine ask a server for once in a start, and not once each: a thousand ranks would be a
thousand requests at the same moment.

    first process:  asks, while the others wait     --> leaves a mark beside the lock, in this machine's own /tmp
    the others:     find the mark of the same start --> use what is on the disk now

Loads without torch.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from models.common.files import locked

MARK_LASTS_S = 600.0
"""A start that takes longer asks again."""


@contextmanager
def first_on_node(what: str, environment: Mapping[str, str] = os.environ) -> Iterator[bool]:
    """Yield whether this process is to ask; of a start's processes on this machine one is told so at a time.

    Where it raises, the next one is told to ask. A process that is alone always asks.

    Args:
        what: names the question.
    """
    start = _start(environment)
    folder = Path(tempfile.gettempdir()) / f"sightline-{os.getuid()}"
    if not start:
        yield True
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    mark = folder / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.asked"
    with locked(mark.with_suffix(".lock")):
        is_asked = mark.is_file() and mark.read_text() == start and time.time() - mark.stat().st_mtime < MARK_LASTS_S
        yield not is_asked
        mark.write_text(start)


def _start(environment: Mapping[str, str]) -> str:
    """What the processes of one start on one machine have in common, and no other start has; empty for one alone."""
    if "SLURM_PROCID" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return " ".join(environment.get(name, "") for name in names)
    if environment.get("WORLD_SIZE", "1") != "1":
        return f"{os.getppid()} {environment.get('MASTER_ADDR')} {environment.get('MASTER_PORT')}"  # of one launcher
    return ""
