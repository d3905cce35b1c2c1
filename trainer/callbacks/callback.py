"""The callback interface of the loop: an EMA or a profiler is a new file, not an edit of the loop.

    on_start -> ( before_batch -> before_update -> after_batch -> [after_rollback] ) ... -> before_finish -> on_end
                                                        |
                                                        +--> on_validation, after a validation

Callbacks run in the loop's order, each on every rank, so that they may use collectives; guard work of the first rank
alone by `ranks.is_first`. Pass your own to `trainer.loop.fit(run, callbacks=[...])`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from trainer.schedule import LearningRate
from trainer.state import StageRun
from trainer.step import GlobalBatch, StepResult

Ending = Literal["finished", "stopped"]
"""`stopped`: asked to, everything saved; the same command resumes."""


class TrainingLoop(Protocol):
    """What a callback sees of the loop (`trainer.loop.Loop`)."""

    @property
    def run(self) -> StageRun:
        """Context, state and services of this start."""

    @property
    def learning_rate(self) -> LearningRate:
        """The stage's learning rate, and its progress."""

    @property
    def factor(self) -> float:
        """The current step's factor on every peak learning rate."""

    def mark(self, phase: str) -> None:
        """Report this rank's next phase to the watchdog."""

    def should_stop(self) -> bool:
        """Whether this rank was asked to stop; the other ranks may not know."""

    def interrupt(self) -> None:
        """Stop after this batch, saved and unfinished. Every rank must call it."""

    def finish_early(self, reason: str) -> None:
        """End the stage as finished after this batch. Every rank must call it."""

    def tell_validation(self, metrics: Mapping[str, float]) -> None:
        """Call `on_validation` of every callback."""


class Callback:
    """Base of callbacks: every method does nothing. Constructors of callbacks do no work; `on_start` does."""

    def on_start(self, loop: TrainingLoop) -> None:
        """Once, before the first batch of this start; `loop.run.state` is the state that the start resumes from."""

    def before_batch(self, loop: TrainingLoop, batch: GlobalBatch) -> None:
        """After a global batch was drawn, before its first forward; it has a sample on some rank."""

    def before_update(self, loop: TrainingLoop, batch: GlobalBatch) -> None:
        """After the last backward of a step that will be taken, before the weights change: the gradient can be read.

        Not called for a batch that is skipped or rolled back.
        """

    def after_batch(self, loop: TrainingLoop, batch: GlobalBatch, result: StepResult) -> None:
        """After each global batch, `result.is_step` or not; the counters of `loop.run.state` already include it.

        After a rollback they are the checkpoint's.
        """

    def after_rollback(self, loop: TrainingLoop) -> None:
        """After the run went back to a checkpoint, before `after_batch` of the batch that caused it."""

    def on_validation(self, loop: TrainingLoop, metrics: Mapping[str, float]) -> None:
        """After a validation; the metrics are the same on every rank."""

    def before_finish(self, loop: TrainingLoop) -> None:
        """Once, when the stage's duration is used up and no stop was requested; before the last checkpoint."""

    def on_end(self, loop: TrainingLoop, ending: Ending) -> None:
        """Once, at the end of a start that finished or was stopped; everything is saved. Not after an error."""
