"""The checkpoint that a stage resumes from, and the record of its rollbacks.

A run that is killed after a rollback reads it back and goes on as it would have. Whether a checkpoint may be gone on
from is `trainer.checkpoint.identity`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.common.errors import InputError
from models.common.files import append_line
from trainer.checkpoint.identity import check, compare
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.records import ROLLBACKS, read_rollbacks
from trainer.checkpoint.verify import agreed_newest
from trainer.distributed.context import DistributedContext

logger = logging.getLogger(__name__)


def resume_point(directory: Path, record: Mapping[str, Any], ranks: DistributedContext) -> CheckpointReader | None:
    """The newest complete checkpoint of a stage, verified by all ranks together. A collective call.

    Args:
        directory: of the stage.
        record: the record of the stage that a checkpoint of this start would hold.

    Returns:
        None where the stage has no checkpoint yet.

    Raises:
        InputError: it was made with another model, data or seed; or there are checkpoints and none is complete, since
    an existing run is never restarted from scratch.
    """
    found, skipped = agreed_newest(directory / "checkpoints", ranks)
    if ranks.is_first:
        for reason in skipped:
            logger.warning(f"skipped {reason}")
    if found is None and skipped:
        raise InputError(
            f"{skipped[0]}; no checkpoint here is sound: restore one, or start anew with run=ANOTHER_DIRECTORY"
        )
    if found is None:
        return None
    reader = CheckpointReader.open(found, verify=False)
    table = compare(reader.state, record)
    logger.info("\n".join([f"going on from {found}", *(field.line() for field in table)]))
    check(table, found, directory.parent / "recipe.json")
    return reader


def note_rollback(directory: Path, entry: Mapping[str, Any]) -> None:
    """Append a rollback to the stage's record of them; it is on the disk on return.

    Args:
        entry: `checkpoint` and `checkpoint_id` say what the run went back to; `stream` and `consumed` say where its
            data goes on.
    """
    append_line(directory / ROLLBACKS, dict(entry))


def rollbacks(directory: Path) -> list[dict[str, Any]]:
    """Every rollback of a stage, in order."""
    return read_rollbacks(directory)


def rollbacks_to(directory: Path, reader: CheckpointReader) -> list[dict[str, Any]]:
    """The rollbacks to this very checkpoint, in order; not those to an earlier one that had its name.

    The id tells them apart. A checkpoint of an older version has none, and neither has a rollback that such a version
    wrote down: there the name decides.
    """
    wanted = (reader.directory.name, reader.state.get("id"))
    return [entry for entry in rollbacks(directory) if (entry["checkpoint"], entry.get("checkpoint_id")) == wanted]


def last_rollback_to(directory: Path, reader: CheckpointReader) -> dict[str, Any] | None:
    """The last rollback to a checkpoint, or None where the data continues at the checkpoint's own position."""
    found = rollbacks_to(directory, reader)
    behind = reader.part("consumed")["batches"]
    return found[-1] if found and found[-1]["consumed"]["batches"] > behind else None
