"""The one loop: for every stage, objective and family.

    draw -> step -> count -> log -> validate -> save -> stop?

What a step is stands in `global_step`, what its numbers mean in `guard`, how a checkpoint is written in `saving`.
"""

from __future__ import annotations

import time
from typing import Literal

from data_pipeline.feed import feed
from models.errors import InputError
from models.files import write_json
from trainer.checkpoint import name_of
from trainer.global_step import GlobalBatch, StepResult, next_batch, take_step
from trainer.insight import predict, table_file, write_table
from trainer.meter import Meter
from trainer.pages import expendable
from trainer.rollback import roll_back
from trainer.schedule import multiplier, progress, warmup_share
from trainer.stage import Stage
from trainer.tracking import ProgressLine, Tracker, memory_metrics

Ending = Literal["finished", "stopped"]
"""`stopped`: asked to, everything saved; the same command goes on."""


def fit(stage: Stage) -> Ending:
    """Run a stage from where it stands to its end, or until it is asked to stop.

    Raises InputError where the data or the numbers leave nothing to go on with; the last checkpoint stands.
    """
    loop = Loop(stage)
    while loop.advance() is not None:
        pass
    return loop.end()


class Loop:
    """One start of a stage: the stage, and what only the loop needs."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.tracker = _open_tracker(stage)
        self.line = ProgressLine(f"{stage.recipe.name}/{stage.name}")
        self.meter = Meter(stage)
        self.warmup = warmup_share(
            stage.config.schedule,
            stage.config.duration,
            epoch_samples=stage.stream.epoch_samples,
            rows=stage.config.batch.global_rows,
        )
        self.saved_at = stage.consumed.steps if stage.checkpoint is not None else -1
        self.is_stop = False
        self.is_stale = False
        """Whether validation has not got better for so long that the stage ends."""
        self._validate()  # a start that was stopped in the middle of it has it still before itself

    def advance(self) -> StepResult | None:
        """Take the next global batch through all phases; None once there is none or a rank was asked to stop."""
        if self._is_over() or self.is_stop:
            return None
        started_s = time.monotonic()
        self._mark("data")
        batch = next_batch(self.stage)
        if batch.samples == 0:
            return None  # every slot has run out: the last epoch is over
        rates = self._rates()
        result = take_step(self.stage, batch, rates)
        self._count(batch, result, rates)
        self._save_beside(result)
        self.stage.longest_step_s = max(self.stage.longest_step_s, time.monotonic() - started_s)
        self.is_stop = self.is_stop or result.sums.is_stop
        return result

    def _rates(self) -> list[float]:
        factor = multiplier(self.stage.config.schedule, self.warmup, self._progress())
        return [group.learning_rate * factor for group in self.stage.groups]

    def _count(self, batch: GlobalBatch, result: StepResult, rates: list[float]) -> None:
        """Enter what became of a batch into the counters, the ledger and the log; go back where that is the verdict."""
        stage, sums = self.stage, result.sums
        is_step = result.verdict.action == "step"
        if is_step:
            stage.consumed = stage.consumed.learnt(
                samples=int(sums.samples), tokens=int(sums.counts.tokens), draws=int(batch.draws)
            )
        else:
            stage.consumed = stage.consumed.skipped(int(batch.draws))
        step = stage.consumed.steps if is_step else None
        told = {"loss": result.loss, "targets": sums.counts.targets} if stage.ranks.is_first else {}
        stage.ledger.write(stage.consumed.batches, step, result.rows, result.left_out, **told)
        self.meter.add(batch, result)
        if is_step:
            self._log(result, rates)
            self._look_inside(batch, result)
            self._validate()
        elif result.verdict.action == "roll back":
            self._go_back(result.verdict.reason)
        elif stage.ranks.is_first:
            number, reason = stage.consumed.batches, result.verdict.reason
            stage.events.write({"event": "skipped", "batch": number, "reason": reason})
            print(f"batch {number} skipped: {reason}; weights, moments and learning rate are as before", flush=True)

    def _go_back(self, reason: str) -> None:
        roll_back(self.stage, reason)
        self.saved_at = self.stage.consumed.steps
        if self.tracker is not None:  # the steps after the checkpoint are taken again
            self.tracker.close()
            self.tracker = _open_tracker(self.stage)

    def _log(self, result: StepResult, rates: list[float]) -> None:
        stage, step = self.stage, self.stage.consumed.steps
        if step != 1 and step % stage.recipe.tracking.log_every_steps != 0:
            return
        metrics = self.meter.read(result, rates, stage.consumed)
        metrics |= {
            "bad_samples": stage.ranks.sum([float(stage.stream.num_bad)])[0],
            "rows_left_out": float(stage.guard.num_rows_left_out),
            "skipped_steps": float(stage.guard.num_skipped_steps),
            "loss_scale": stage.loss_scale.value,
            "held_by_saves_s": stage.saver.held_s,
            **memory_metrics(stage.device),
        }
        if self.tracker is not None:
            self.tracker.log(step, metrics)
            self.line.show(step, self._progress(), metrics)

    def _look_inside(self, batch: GlobalBatch, result: StepResult) -> None:
        """Histograms of the step and a table of its first tokens, where they were asked for."""
        stage, step = self.stage, self.stage.consumed.steps
        if result.histograms and self.tracker is not None:
            self.tracker.log_histograms(step, result.histograms)
        if not stage.insight.wants_table(step):
            return
        micro = next(iter(feed([batch.rows[: stage.config.batch.micro_rows]], stage.text, stage.device)))
        table = predict(stage.engine.module, stage.engine, micro)
        if self.tracker is not None:
            file = table_file(stage.directory, step)
            with expendable(file):
                write_table(file, f"{stage.recipe.name}/{stage.name}, step {step}", table, stage.tokenizer)
                self.tracker.log_page(step, "tokens", file)

    def _validate(self, *, is_last: bool = False) -> None:
        """Measure, note the best, and keep its checkpoint; the end of patience ends the stage."""
        stage, config, step = self.stage, self.stage.config.validation, self.stage.consumed.steps
        if config is None or stage.validator is None or step in {0, stage.best.last_step}:
            return
        if not is_last and step % config.every_steps != 0:
            return
        self._mark("validation")
        metrics = stage.validator.run(step, stage.is_asked_to_stop)
        if metrics is None:
            self.is_stop = True
            return
        if self.tracker is not None:
            self.tracker.log_validation(step, metrics, stage.validator.answers)
        if stage.best.offer(metrics[config.metric], step, lower_is_better=config.lower_is_better):
            self._save()
        patience = config.early_stopping.patience if config.early_stopping is not None else None
        self.is_stale = patience is not None and stage.best.num_worse >= patience

    def _save_beside(self, result: StepResult) -> None:
        """Commit a checkpoint that every rank has written; begin the next one when it is due."""
        stage = self.stage
        if stage.saver.is_busy and result.sums.is_saved:
            stage.finish_save()
        if stage.consumed.steps % stage.config.checkpoint.every_steps == 0 and result.verdict.action == "step":
            self._save()

    def _save(self) -> None:
        if self.saved_at == self.stage.consumed.steps:
            return
        if self.stage.saver.is_busy:
            self.stage.finish_save()
        self.stage.begin_save()
        self.saved_at = self.stage.consumed.steps

    def end(self) -> Ending:
        """Validate a last time, save, and say how it ended."""
        stage = self.stage
        is_finished = not self.is_stop
        if is_finished:
            self._validate(is_last=True)
            is_finished = not self.is_stop
        self._save()
        if stage.saver.is_busy:
            stage.finish_save()
        if is_finished:
            self._finish()
        else:
            self._tell_stop()
        if self.tracker is not None:
            self.line.close()
            self.tracker.close()
        return "finished" if is_finished else "stopped"

    def _tell_stop(self) -> None:
        stage = self.stage
        reasons = sorted({reason for reason in stage.ranks.gather(stage.interrupt.reason) if reason})
        if stage.ranks.is_first:
            print(
                f"{stage.recipe.name}/{stage.name}: stopped by {', '.join(reasons)} after step {stage.consumed.steps}; "
                f"saved in {stage.checkpoint}; the same command goes on from there",
                flush=True,
            )

    def _finish(self) -> None:
        stage = self.stage
        last = stage.directory / "checkpoints" / name_of(stage.consumed.steps)
        if stage.checkpoint != last:
            raise InputError(f"{last}: the last checkpoint could not be written; free some space and start again")
        is_best = stage.config.checkpoint.finish_with == "best" and stage.best.value is not None
        chosen = last.with_name(name_of(stage.best.step)) if is_best else last
        if stage.ranks.is_first:
            if stage.lock is not None:
                stage.lock.check()
            ended = {"checkpoint": chosen.name, "steps": stage.consumed.steps, "samples": stage.consumed.samples}
            write_json(stage.directory / "finished.json", ended)
            why = "; validation has stopped getting better" if self.is_stale else ""
            print(
                f"{stage.recipe.name}/{stage.name}: finished after {stage.consumed.steps} steps{why}; {chosen}",
                flush=True,
            )
        stage.ranks.barrier()

    def _is_over(self) -> bool:
        """Whether the duration is used up; epochs end when the data does, since packed samples wait for their row."""
        return self.is_stale or (self.stage.config.duration.unit != "epochs" and self._progress() >= 1.0)

    def _progress(self) -> float:
        return progress(self.stage.config.duration, self.stage.consumed, self.stage.stream.epoch_samples)

    def _mark(self, phase: str) -> None:
        self.stage.watch.mark(phase, self.stage.consumed.batches + 1)


def _open_tracker(stage: Stage) -> Tracker | None:
    if not stage.ranks.is_first:
        return None
    return Tracker(
        stage.directory,
        stage.recipe.tracking,
        title=f"{stage.recipe.name}/{stage.name}",
        recipe=stage.recipe.model_dump(mode="json"),
        resumed_at=stage.consumed.steps,
    )
