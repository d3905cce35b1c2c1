"""When checkpoints are written: at their interval, on request, and at the end. `trainer.checkpoint` writes them.

Writing overlaps with training. A step's totals give the number of ranks that have finished writing; after the first
batch where that is all of them, every rank commits the checkpoint.
"""

from __future__ import annotations

import logging
from pathlib import Path

from trainer.callbacks.callback import Callback, TrainingLoop
from trainer.checkpoint.format import name_of
from trainer.state import StageRun
from trainer.step import GlobalBatch, StepResult

logger = logging.getLogger(__name__)


class CheckpointSaving(Callback):
    """Begins and commits the checkpoints of a stage; every rank calls each method at the same step."""

    def __init__(self, run: StageRun) -> None:
        self._run = run
        self.latest: Path | None = run.resumed_from
        """The last checkpoint that was committed."""
        self._saved_at = run.state.consumed.steps if run.resumed_from is not None else -1

    @property
    def can_go_back(self) -> bool:
        """Whether there is a checkpoint to roll back to, or one being written."""
        return self.latest is not None or self._run.services.checkpoints.is_busy

    def save(self) -> None:
        """Begin a checkpoint of the state after the last step, unless it is saved; first commits a pending one."""
        state, services, context = self._run.state, self._run.services, self._run.context
        if self._saved_at == state.consumed.steps:
            return
        self.settle()
        services.watchdog.mark("saving", state.consumed.steps)
        services.checkpoints.begin(
            state.consumed.steps,
            fragments=services.engine.fragments(),
            inherited=services.inherited,
            state={**context.record, **state.state_dict(context.ranks, num_updates=services.engine.num_updates)},
        )
        self._saved_at = state.consumed.steps

    def save_if_due(self) -> None:
        """Begin a checkpoint where `checkpoint.every_steps` asks for one after the last step."""
        if self._run.state.consumed.steps % self._run.context.config.checkpoint.every_steps == 0:
            self.save()

    def settle(self) -> None:
        """Commit the checkpoint that is being written. A failed write is a warning, not the end of the run."""
        checkpoints, context = self._run.services.checkpoints, self._run.context
        if not checkpoints.is_busy:
            return
        name = checkpoints.name
        fault = checkpoints.finish(spare=[name_of(step) for step in self._run.state.best.steps])
        if not fault:
            self.latest = context.directory / "checkpoints" / name
        elif context.ranks.is_first:
            logger.warning(f"{fault}; training goes on, older checkpoints are untouched")

    def after_batch(self, loop: TrainingLoop, batch: GlobalBatch, result: StepResult) -> None:
        """Commit what every rank has written; begin the next checkpoint when it is due."""
        checkpoints, context = self._run.services.checkpoints, self._run.context
        if checkpoints.is_busy and result.totals.num_written == context.ranks.world_size:
            self.settle()
        if result.is_step:
            self.save_if_due()

    def after_rollback(self, loop: TrainingLoop) -> None:
        """The state is the checkpoint's again."""
        self._saved_at = self._run.state.consumed.steps
