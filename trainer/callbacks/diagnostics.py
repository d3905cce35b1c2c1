"""Diagnostics during training, where the recipe asks for them: histograms by layer, a table of predicted tokens."""

from __future__ import annotations

from trainer.callbacks.callback import Callback, TrainingLoop
from trainer.callbacks.metrics import MetricsLogging
from trainer.config.schema import TrackingConfig
from trainer.micro_batches import MicroBatching
from trainer.step import GlobalBatch, StepResult
from trainer.tracking.diagnostics import layer_histograms, predict, table_file, write_table
from trainer.tracking.loggers import Histogram
from trainer.validation.html_report import best_effort


class Diagnostics(Callback):
    """Histograms of weights before an update and of its gradient before clipping; a token page after it."""

    def __init__(self, config: TrackingConfig, micro_batching: MicroBatching, metrics: MetricsLogging) -> None:
        self._config, self._micro_batching, self._metrics = config, micro_batching, metrics
        self._histograms: dict[str, Histogram] = {}

    def before_update(self, loop: TrainingLoop, batch: GlobalBatch) -> None:
        """Histograms, where the step that is about to be taken is due."""
        self._histograms = {}
        if _is_due(loop.run.state.consumed.steps + 1, self._config.histograms_every_steps):
            engine, ranks = loop.run.services.engine, loop.run.context.ranks
            self._histograms = layer_histograms(engine.slices(), "weights/", ranks)
            self._histograms |= layer_histograms(engine.own_gradients(), "gradients/", ranks)

    def after_batch(self, loop: TrainingLoop, batch: GlobalBatch, result: StepResult) -> None:
        """Log the histograms; write the table, where the step is due."""
        if not result.is_step:
            return
        step, tracker = loop.run.state.consumed.steps, self._metrics.tracker
        if self._histograms and tracker is not None:
            tracker.log_histograms(step, self._histograms)
        if _is_due(step, self._config.token_table_every_steps):
            self._write_table(loop, batch, step)

    def _write_table(self, loop: TrainingLoop, batch: GlobalBatch, step: int) -> None:
        """Every rank predicts, since the forward goes through the engine; the first one writes."""
        context, engine = loop.run.context, loop.run.services.engine
        table = predict(engine.module, engine, self._micro_batching.one(batch.rows))
        if self._metrics.tracker is not None:
            file = table_file(context.directory, step)
            with best_effort(file):
                write_table(file, f"{context.title}, step {step}", table, context.metadata.tokenizer)
                self._metrics.tracker.log_page(step, "tokens", file)


def _is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0
