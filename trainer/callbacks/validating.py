"""When a stage is validated, and the consequences: the best checkpoint, and early stopping.

The checkpoint that is due at the same step is written first: a validation takes long, and one that ends the run must
not cost the steps before it. So a checkpoint may not know the validation of its own step; a start that resumes from
it takes the result from validation.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.common.files import read_lines
from trainer.callbacks.callback import Callback, TrainingLoop
from trainer.callbacks.saving import CheckpointSaving
from trainer.config.schema import Validation
from trainer.step import GlobalBatch, StepResult
from trainer.validation.validator import Validator


class Validating(Callback):
    """Validates every `validation.every_steps` steps and at the end; a validation that was interrupted is repeated."""

    def __init__(self, validator: Validator, config: Validation, saving: CheckpointSaving) -> None:
        self._validator, self._config, self._saving = validator, config, saving

    def on_start(self, loop: TrainingLoop) -> None:
        """Take over the last start's validation of this step, or repeat the one in which it was stopped."""
        step = loop.run.state.consumed.steps
        if step not in {0, loop.run.state.best.last_step}:
            recorded = loop.run.context.ranks.gather(self._recorded(loop, step))[0]
            if recorded is not None:
                self._judge(loop, step, recorded)
        self._validate_if_due(loop)

    def after_batch(self, loop: TrainingLoop, batch: GlobalBatch, result: StepResult) -> None:
        """Validate where the step is due."""
        if result.is_step:
            self._validate_if_due(loop)

    def before_finish(self, loop: TrainingLoop) -> None:
        """Validate after the last step, due or not."""
        self._saving.save()
        self._validate(loop)

    def _validate_if_due(self, loop: TrainingLoop) -> None:
        if loop.run.state.consumed.steps % self._config.every_steps == 0:
            self._validate(loop)

    def _validate(self, loop: TrainingLoop) -> None:
        state = loop.run.state
        step = state.consumed.steps
        if step in {0, state.best.last_step}:
            return
        self._saving.save_if_due()
        self._saving.settle()  # what is written and not committed would be lost with the run

        def should_stop() -> bool:
            # Asked before every batch and every token of an answer: each of them is a sign of life of its own, so
            # that a validation may take longer than `guard.rank_timeout_s`.
            loop.mark("validation")
            return loop.should_stop()

        loop.mark("validation")
        metrics = self._validator.run(step, should_stop)
        if metrics is None:
            loop.interrupt()
            return
        loop.tell_validation(metrics)
        self._judge(loop, step, metrics)

    def _judge(self, loop: TrainingLoop, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the best checkpoint, and end a stage that no longer gets better."""
        best = loop.run.state.best
        if best.offer(metrics[self._config.metric], step, lower_is_better=self._config.lower_is_better):
            self._saving.save()
        stopping = self._config.early_stopping
        if stopping is not None and best.num_worse >= stopping.patience:
            loop.finish_early("validation has stopped getting better")

    def _recorded(self, loop: TrainingLoop, step: int) -> dict[str, Any] | None:
        """The line of a finished validation of this step, on the first rank."""
        if not loop.run.context.ranks.is_first:
            return None
        lines = read_lines(loop.run.context.directory / "validation.jsonl")
        return next((line for line in lines if line.get("step") == step and self._config.metric in line), None)
