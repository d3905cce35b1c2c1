"""Logs a stage's metrics: one record to files and loggers, and one line on the console.

Owns when a record is due and its metrics. Rates and shares are in `trainer.tracking.throughput`, files and loggers in
`trainer.tracking.tracker`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trainer.callbacks.callback import Callback, Ending, TrainingLoop
from trainer.distributed.device import as_record
from trainer.flops.utilisation import peak_flops
from trainer.state import StageRun
from trainer.step import GlobalBatch, StepResult
from trainer.tracking.throughput import ThroughputMeter
from trainer.tracking.tracker import Metrics, ProgressLine, Tracker, memory_metrics


class MetricsLogging(Callback):
    """Logs the first step and every `tracking.log_every_steps`. Every rank counts, the first one writes."""

    def __init__(self, run: StageRun) -> None:
        self._run = run
        self.tracker: Tracker | None = None
        """Open on the first rank between `on_start` and `on_end`."""
        self._of_the_start: Metrics = {}
        self._line = ProgressLine(run.context.title)
        device = run.context.device
        self._meter = ThroughputMeter(
            [group.part for group in run.services.engine.groups],
            run.context.estimator,
            num_devices=run.context.ranks.world_size,
            peak=peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None,
        )

    def on_start(self, loop: TrainingLoop) -> None:
        """Open the logs, truncate them to the step that this start resumes from, and begin to count."""
        self._open_tracker()
        self._meter.reset()

    def _open_tracker(self) -> None:
        context = self._run.context
        if context.ranks.is_first:
            self.tracker = Tracker.open(
                context.directory,
                context.recipe.tracking,
                title=context.title,
                recipe=context.recipe.model_dump(mode="json"),
                resumed_at=self._run.state.consumed.steps,
                device=as_record(
                    context.device,
                    context.config.engine.precision,
                    is_deterministic=context.config.engine.deterministic,
                ),
            )

    def add_of_the_start(self, metrics: Metrics, seconds: float) -> None:
        """Figures that go into the next line and no other; the seconds that they took count for no rate."""
        self._of_the_start |= metrics
        self._meter.leave_out(seconds)
        memory_metrics(self._run.context.device)  # the next peak is of the steps

    def after_batch(self, loop: TrainingLoop, batch: GlobalBatch, result: StepResult) -> None:
        """Count the batch; log where it is due."""
        totals = result.totals
        self._meter.add(totals.counts, totals.num_samples, totals.num_positions, batch.totals.num_images, batch.wait_s)
        if not result.is_step:
            return
        self._meter.add_learnt(totals.loss_sum, totals.num_correct, totals.counts.targets)
        step = self._run.state.consumed.steps
        if step == 1 or step % self._run.context.recipe.tracking.log_every_steps == 0:
            self._log(loop, step, result)

    def _log(self, loop: TrainingLoop, step: int, result: StepResult) -> None:
        context, state, services = self._run.context, self._run.state, self._run.services
        metrics = self._meter.read(
            norm=result.totals.norm,
            squared_norms=result.totals.squared_norms,
            learning_rates=services.engine.learning_rates(loop.factor),
        )
        metrics |= {
            "samples": float(state.consumed.samples),
            "tokens": float(state.consumed.tokens),
            "bad_samples": context.ranks.sum([float(state.stream.num_bad)])[0],
            "rows_left_out": float(state.guard.num_rows_left_out),
            "skipped_steps": float(state.guard.num_skipped_steps),
            "loss_scale": state.loss_scale.value,
            "held_by_saves_s": services.checkpoints.blocked_s,
            **memory_metrics(context.device),
            **self._of_the_start,
        }
        self._of_the_start = {}
        if self.tracker is not None:
            self.tracker.log(step, metrics)
            self._line.show(step, loop.learning_rate.progress(state.consumed), metrics)

    def after_rollback(self, loop: TrainingLoop) -> None:
        """Remove the lines of steps after the checkpoint, since those steps are taken again."""
        if self.tracker is not None:
            self.tracker.close()
            self._open_tracker()

    def on_validation(self, loop: TrainingLoop, metrics: Mapping[str, float]) -> None:
        """Log a validation's metrics; they are a record of their own."""
        validator = self._run.services.validator
        if self.tracker is not None and validator is not None:
            self.tracker.log_validation(self._run.state.consumed.steps, dict(metrics), validator.answers)

    def on_end(self, loop: TrainingLoop, ending: Ending) -> None:
        """Flush and close."""
        if self.tracker is not None:
            self._line.close()
            self.tracker.close()
