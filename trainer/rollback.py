"""Going back to the last good checkpoint in a running stage, past the data that led to a spike.

The weights, the moments and the guard's memory become the checkpoint's; the data goes on after the batch that spiked,
so nothing of what lay between is seen again. It is recorded first: a start that finds the checkpoint and the record
goes on in the same way.
"""

from __future__ import annotations

from data_pipeline.stream import merge_states
from models.errors import InputError
from trainer.checkpoint import CheckpointReader
from trainer.resume import load_progress, note_rollback, rollbacks
from trainer.stage import Stage


def roll_back(stage: Stage, reason: str) -> None:
    """Go back after the batch that `stage.consumed` counts as its last; every rank must call it.

    Raises InputError where there is no checkpoint to go back to, or where it was done as often as it may be.
    """
    if stage.saver.is_busy:
        stage.finish_save()
    limit = stage.config.guard.spike.max_rollbacks
    number = stage.ranks.gather(len(rollbacks(stage.directory)))[0] + 1
    where = f"batch {stage.consumed.batches}: {reason}"
    if stage.checkpoint is None:
        raise InputError(f"{where}; no checkpoint to go back to: lower the learning rate or look at the samples")
    if number > limit:
        raise InputError(
            f"{where}; gone back {limit} times already: lower the learning rate, or look at "
            f"{stage.directory / 'events.jsonl'}"
        )
    reader = CheckpointReader(stage.checkpoint)
    consumed = {
        **reader.state["consumed"],
        "draws": stage.consumed.draws,
        "batches": stage.consumed.batches,
    }
    told = {
        "checkpoint": stage.checkpoint.name,
        "first_batch": _position(stage, reader) + 1,
        "last_batch": stage.consumed.batches,
        "reason": reason,
    }
    entry = {
        **told,
        "attempt": stage.ledger.attempt,
        "consumed": consumed,
        "stream": merge_states(stage.ranks.gather(stage.stream.state_dict())),
    }
    if stage.ranks.is_first:
        note_rollback(stage.directory, entry)
        stage.events.write({"event": "rolled back", **told})
        print(
            f"{where}; going back to {stage.checkpoint} ({number} of {limit} times), past the data of batches "
            f"{told['first_batch']} to {told['last_batch']}",
            flush=True,
        )
    stage.ranks.barrier()
    stage.engine.set_weights(reader.weight)
    stage.consumed = load_progress(
        stage.directory,
        reader,
        engine=stage.engine,
        stream=stage.stream,
        guard=stage.guard,
        loss_scale=stage.loss_scale,
    )


def _position(stage: Stage, reader: CheckpointReader) -> int:
    """The last global batch that the checkpoint, with earlier rollbacks to it, has behind it."""
    earlier = [entry for entry in rollbacks(stage.directory) if entry["checkpoint"] == reader.directory.name]
    return max([int(reader.state["consumed"]["batches"]), *(int(entry["last_batch"]) for entry in earlier)])
