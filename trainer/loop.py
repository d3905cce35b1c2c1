"""The one loop: for every stage, objective and family.

    draw -> step -> count -> log -> validate -> save -> stop?

The step is in `trainer.step`, the decision on its numbers in `trainer.guard`; everything else is a callback
(`trainer.callbacks`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from models.common.errors import AwayError, InputError
from models.common.files import write_json
from trainer.callbacks.callback import Callback, Ending
from trainer.callbacks.diagnostics import Diagnostics
from trainer.callbacks.metrics import MetricsLogging
from trainer.callbacks.numerics import NumericsProbe
from trainer.callbacks.saving import CheckpointSaving
from trainer.callbacks.unused_parameters import UnusedParameterCheck
from trainer.callbacks.validating import Validating
from trainer.checkpoint.format import name_of
from trainer.distributed.seeding import derive_seed
from trainer.micro_batches import MicroBatching
from trainer.nonfinite import NonFiniteTracer
from trainer.rollback import roll_back
from trainer.state import StageRun
from trainer.step import GlobalBatch, OptimizerStep, Signals, StepResult, next_batch

logger = logging.getLogger(__name__)


def fit(run: StageRun, callbacks: Sequence[Callback] = ()) -> Ending:
    """Run a stage from its current state to its end, or until it is asked to stop.

    Args:
        callbacks: further ones, called after the loop's own.

    Raises:
        InputError: the data or the numbers make it impossible to continue; the last checkpoint is intact.
    """
    loop = Loop(run, callbacks)
    loop.start()
    return loop.finish()


class Loop:
    """One start of a stage. `start` once, `advance` until it gives None, then `end`; `finish` does both."""

    def __init__(self, run: StageRun, callbacks: Sequence[Callback] = ()) -> None:
        self.run = run
        self.learning_rate = run.context.learning_rate(run.state.stream.epoch_samples)
        self.factor = 0.0
        """The current step's factor on every peak learning rate."""
        self._saving = CheckpointSaving(run)
        self._micro_batching = _micro_batching(run)
        self.callbacks = [*_own_callbacks(run, self._saving, self._micro_batching), self._saving, *callbacks]
        self.step = self._optimizer_step()
        self._is_interrupted = False
        self._finished_early = ""
        self._longest_step_s = 0.0

    def start(self) -> None:
        """Start the callbacks; a validation that the last start did not finish is repeated here."""
        for callback in self.callbacks:
            callback.on_start(self)

    def advance(self) -> StepResult | None:
        """Process the next global batch in all phases; None at the end of the data or when a rank was asked to stop."""
        if self._is_over() or self._is_interrupted:
            return None
        started_s = self.run.services.watchdog.running_s()
        state = self.run.state
        self.mark("data")
        try:
            batch = next_batch(state.stream, self.run.context.ranks)
        except AwayError as error:
            self._leave(error)
            return None
        if batch.totals.num_samples == 0:
            return None  # every row of the batch has run out of data: the last epoch is over
        started_s += self._before_batch(batch)
        self.factor = self.learning_rate.at(state.consumed)
        result = self.step.take(batch, state.consumed, self.factor, lambda: self._before_update(batch))
        self._count(batch, result)
        if result.decision.action == "roll back":
            self._roll_back(result.decision.reason)
        for callback in self.callbacks:
            callback.after_batch(self, batch, result)
        self._longest_step_s = max(self._longest_step_s, self.run.services.watchdog.running_s() - started_s)
        self._is_interrupted = self._is_interrupted or result.totals.num_stops > 0
        return result

    def finish(self) -> Ending:
        """Go on to the stage's end, or until a rank was asked to stop."""
        while self.advance() is not None:
            pass
        return self.end()

    def should_stop(self) -> bool:
        """Whether this rank has a reason to stop; those of other ranks are only known from a sum over the ranks."""
        services = self.run.services
        return services.preemption.is_due(self._longest_step_s, services.checkpoints.longest_s)

    def interrupt(self) -> None:
        """Stop after this batch, saved and unfinished: some rank was asked to. Every rank must call it."""
        self._is_interrupted = True

    def finish_early(self, reason: str) -> None:
        """End the stage as finished after this batch, for `reason`. Every rank must call it."""
        self._finished_early = reason

    def tell_validation(self, metrics: Mapping[str, float]) -> None:
        """Call `on_validation` of every callback."""
        for callback in self.callbacks:
            callback.on_validation(self, metrics)

    def mark(self, phase: str) -> None:
        """Report this rank's next phase to the watchdog."""
        self.run.services.watchdog.mark(phase, self.run.state.consumed.batches + 1)

    def end(self) -> Ending:
        """Validate a last time, save, and return how the stage ended."""
        if not self._is_interrupted:
            for callback in self.callbacks:
                callback.before_finish(self)
        ending: Ending = "stopped" if self._is_interrupted else "finished"
        self._saving.save()
        self._saving.settle()
        if ending == "finished":
            self._finish()
        else:
            self._tell_stop()
        for callback in self.callbacks:
            callback.on_end(self, ending)
        return ending

    def _before_batch(self, batch: GlobalBatch) -> float:
        """Returns the seconds that callbacks took, which are no part of a step."""
        started_s = self.run.services.watchdog.running_s()
        for callback in self.callbacks:
            callback.before_batch(self, batch)
        return self.run.services.watchdog.running_s() - started_s

    def _leave(self, error: AwayError) -> None:
        """Stop, saved, where data are away: every rank raised this at the same batch, which was not used.

        Raises:
            AwayError: there is nothing to save yet.
        """
        if self.run.state.consumed.batches == 0:
            raise error
        self.run.state.stream.take_back()
        self.run.services.preemption.reason = self.run.services.preemption.reason or str(error)
        self._is_interrupted = True

    def _before_update(self, batch: GlobalBatch) -> None:
        for callback in self.callbacks:
            callback.before_update(self, batch)

    def _count(self, batch: GlobalBatch, result: StepResult) -> None:
        """Add a batch's outcome to the counters and the ledger."""
        state, services, ranks = self.run.state, self.run.services, self.run.context.ranks
        totals, num_draws = result.totals, int(batch.totals.num_draws)
        if result.is_step:
            state.consumed = state.consumed.learnt(
                samples=int(totals.num_samples), tokens=int(totals.counts.tokens), draws=num_draws
            )
        else:
            state.consumed = state.consumed.skipped(num_draws)
        number, step = state.consumed.batches, state.consumed.steps if result.is_step else None
        told = {"loss": result.loss, "targets": totals.counts.targets} if ranks.is_first else {}
        services.ledger.write(number, step, result.rows, result.left_out, **told)
        if result.decision.action == "skip":
            reason = result.decision.reason
            logger.info(f"batch {number} skipped: {reason}; weights, moments and learning rate are as before")
            if ranks.is_first:
                services.events.write({"event": "skipped", "batch": number, "reason": reason})

    def _roll_back(self, reason: str) -> None:
        self._saving.settle()
        roll_back(self.run, self._saving.latest, reason)
        for callback in self.callbacks:
            callback.after_rollback(self)

    def _optimizer_step(self) -> OptimizerStep:
        context, state, services = self.run.context, self.run.state, self.run.services
        return OptimizerStep(
            services.engine,
            guard=state.guard,
            loss_scale=state.loss_scale,
            micro_batching=self._micro_batching,
            ranks=context.ranks,
            nonfinite=NonFiniteTracer(
                services.engine,
                state.stream,
                events=services.events,
                text=context.metadata.text,
                device=context.device,
                ranks=context.ranks,
            ),
            seed_of=lambda num_steps: derive_seed(
                context.recipe.seed, context.stage, "dropout", num_steps, context.ranks.rank
            ),
            signals=Signals(
                mark=self.mark,
                should_stop=self.should_stop,
                is_written=lambda: services.checkpoints.is_written,
                can_go_back=lambda: self._saving.can_go_back,
            ),
        )

    def _tell_stop(self) -> None:
        context = self.run.context
        reasons = sorted({reason for reason in context.ranks.gather(self.run.services.preemption.reason) if reason})
        by = f" by {', '.join(reasons)}" if reasons else ""
        logger.info(
            f"{context.title}: stopped{by} after step {self.run.state.consumed.steps}; "
            f"saved in {self._saving.latest}; the same command resumes from there"
        )

    def _finish(self) -> None:
        context, state, lock = self.run.context, self.run.state, self.run.services.lock
        last = context.directory / "checkpoints" / name_of(state.consumed.steps)
        if self._saving.latest != last:
            raise InputError(f"{last}: the last checkpoint could not be written; free some space and start again")
        is_best = context.config.checkpoint.finish_with == "best" and state.best.value is not None
        chosen = last.with_name(name_of(state.best.step)) if is_best else last
        if context.ranks.is_first:
            if lock is not None:
                lock.check()
            ended = {"checkpoint": chosen.name, "steps": state.consumed.steps, "samples": state.consumed.samples}
            write_json(context.directory / "finished.json", ended)
        why = f"; {self._finished_early}" if self._finished_early else ""
        logger.info(f"{context.title}: finished after {state.consumed.steps} steps{why}; {chosen}")
        context.ranks.barrier()

    def _is_over(self) -> bool:
        """Whether the duration is used up; epochs end with the data, since packed samples wait for their row."""
        if self._finished_early:
            return True
        is_in_epochs = self.run.context.config.duration.unit == "epochs"
        return not is_in_epochs and self.learning_rate.progress(self.run.state.consumed) >= 1.0


def _own_callbacks(run: StageRun, saving: CheckpointSaving, micro_batching: MicroBatching) -> list[Callback]:
    metrics = MetricsLogging(run)
    own = [
        UnusedParameterCheck(),
        metrics,
        NumericsProbe(metrics),
        Diagnostics(run.context.recipe.tracking, micro_batching, metrics),
    ]
    validator, config = run.services.validator, run.context.config.validation
    return own if validator is None or config is None else [*own, Validating(validator, config, saving)]


def _micro_batching(run: StageRun) -> MicroBatching:
    context = run.context
    return MicroBatching(
        context.metadata.text,
        context.device,
        context.config.batch.micro_rows,
        context.num_micro_batches,
        context.estimator,
    )
