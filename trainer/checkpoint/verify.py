"""Which checkpoint is sound, agreed on by all ranks: every file is hashed once, by one of them.

    first rank: names, newest first --> each rank hashes its share of the files --> one verdict for all

A checkpoint of 84 GB takes one process minutes to hash; 1,024 ranks take a moment, and read no byte of it twice.
"""

from __future__ import annotations

from pathlib import Path

from models.common.errors import InputError
from trainer.checkpoint.format import checkpoints_in, fault_of
from trainer.distributed.context import DistributedContext


def agreed_fault(directory: Path, ranks: DistributedContext) -> str | None:
    """Why a checkpoint is not complete, or None where it is: `fault_of`, shared over the ranks. A collective call."""
    faults = ranks.gather(fault_of(directory, (ranks.rank, ranks.world_size)))
    return next((fault for fault in faults if fault is not None), None)


def agreed_newest(root: Path, ranks: DistributedContext) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, as `format.newest` gives it, the same on every rank. A collective call."""
    names = ranks.gather([path.name for path in checkpoints_in(root)] if ranks.is_first else [])[0]
    skipped: list[str] = []
    for name in reversed(names):
        fault = agreed_fault(root / name, ranks)
        if fault is None:
            return root / name, skipped
        skipped.append(f"{root / name}: {fault}")
    return None, skipped


def check_sound(directory: Path, ranks: DistributedContext) -> None:
    """Raise InputError on every rank where a checkpoint is not complete. A collective call."""
    fault = agreed_fault(directory, ranks)
    if fault is not None:
        raise InputError(f"{directory}: {fault}; use another checkpoint")
