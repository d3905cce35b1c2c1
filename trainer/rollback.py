"""Going back to the last good checkpoint in a running stage, past the data that led to a spike.

Weights, moments and the guard's state are restored from the checkpoint; the data continues after the batch that spiked,
so nothing in between is seen again. The rollback is recorded first: a start that finds checkpoint and record resumes in
the same way.
"""

from __future__ import annotations

import logging
from pathlib import Path

from data_pipeline.stream_state import merge_states
from models.common.errors import InputError
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.resume import note_rollback, rollbacks_to
from trainer.checkpoint.verify import check_sound
from trainer.state import StageRun

logger = logging.getLogger(__name__)


def roll_back(run: StageRun, checkpoint: Path | None, reason: str) -> None:
    """Go back to `checkpoint`, and continue with the data after the state's last batch; every rank must call it.

    No checkpoint may be in progress.

    Raises:
        InputError: there is no checkpoint to go back to, or the limit on rollbacks is reached.
    """
    context, state, services = run.context, run.state, run.services
    limit = context.config.guard.spike.max_rollbacks
    number = state.num_rollbacks + 1
    where = f"batch {state.consumed.batches}: {reason}"
    if checkpoint is None:
        raise InputError(f"{where}; no checkpoint to go back to: lower the learning rate or look at the samples")
    if number > limit:
        raise InputError(
            f"{where}; gone back {limit} times already: lower the learning rate, or look at "
            f"{context.directory / 'events.jsonl'}"
        )
    check_sound(checkpoint, context.ranks)
    reader = CheckpointReader.open(checkpoint, verify=False)
    consumed = {
        **reader.part("consumed"),
        "draws": state.consumed.draws,
        "batches": state.consumed.batches,
    }
    told = {
        "checkpoint": checkpoint.name,
        "first_batch": _last_batch_behind(context.directory, reader) + 1,
        "last_batch": state.consumed.batches,
        "reason": reason,
    }
    entry = {
        **told,
        "checkpoint_id": reader.state.get("id"),
        "attempt": services.ledger.restart,
        "consumed": consumed,
        "stream": merge_states(context.ranks.gather(state.stream.state_dict())),
    }
    logger.info(
        f"{where}; going back to {checkpoint} ({number} of {limit} times), past the data of batches "
        f"{told['first_batch']} to {told['last_batch']}"
    )
    if context.ranks.is_first:
        note_rollback(context.directory, entry)
        services.events.write({"event": "rolled back", **told})
    context.ranks.barrier()
    services.engine.set_weights(reader.fill)
    services.engine.load_moments(reader.fill, int(reader.part("num_updates")))
    state.load_progress(reader, context.directory)


def _last_batch_behind(directory: Path, reader: CheckpointReader) -> int:
    """The last global batch before the checkpoint's position, with earlier rollbacks to it."""
    earlier = (int(entry["last_batch"]) for entry in rollbacks_to(directory, reader))
    return max([int(reader.part("consumed")["batches"]), *earlier])
