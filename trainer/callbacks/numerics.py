"""Once, before the first step of a stage in bf16 or fp16: does its gradient point where fp32's points?

Owns when, for which rows and on which ranks. The comparison is `trainer.engine.numerics`, its words
`trainer.tracking.numerics`. Weights, moments, random streams and the data stay as they are, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from data_pipeline.sample import Row
from models.common.memory import free_bytes
from trainer.callbacks.callback import Callback, TrainingLoop
from trainer.callbacks.metrics import MetricsLogging
from trainer.engine.numerics import Agreement, compare_gradients, few_rows, image_is_first, is_quantized, one_by_one
from trainer.state import StageRun
from trainer.step import GlobalBatch
from trainer.tracking.numerics import as_metrics, describe, findings_of, warning
from trainer.validation.validator import undisturbed

logger = logging.getLogger(__name__)


class NumericsProbe(Callback):
    """Measures before the first step of a stage; a start that resumes measured then, and does not again."""

    def __init__(self, metrics: MetricsLogging) -> None:
        self._metrics = metrics

    def before_batch(self, loop: TrainingLoop, batch: GlobalBatch) -> None:
        """Compare the gradients of some rows of every rank's share of the first global batch."""
        run = loop.run
        if run.state.consumed.batches > 0 or run.context.config.engine.precision == "fp32":
            return
        loop.mark("the numerics probe")
        started_s = run.services.watchdog.running_s()
        reason = _reason_to_skip(run)
        rows = few_rows(batch.rows)
        if not reason:
            found, reason = self._compare(run, rows)
        seconds = run.services.watchdog.running_s() - started_s
        if run.context.device.type == "cuda":
            torch.cuda.empty_cache()
        if reason:
            logger.info(f"{run.context.title}: numerics probe skipped: {reason}")
            return
        self._tell(run, found, rows, seconds)

    def _compare(self, run: StageRun, rows: Sequence[Row]) -> tuple[dict[str, Agreement], str]:
        """The agreement over the rows of all ranks; or why there is none."""
        context, engine, ranks = run.context, run.services.engine, run.context.ranks
        are_compared = context.config.objective.compares_rows
        batches = one_by_one(rows, context.metadata.text, context.device, are_compared=are_compared)
        found = {group.part: Agreement() for group in engine.groups}
        fault = ""
        with engine.whole_weights(), undisturbed(engine.module, context.device):
            try:
                found = compare_gradients(
                    engine.module,
                    engine.groups,
                    batches,
                    (lambda is_needed: any(ranks.gather(is_needed))) if are_compared else bool,
                )
            except torch.OutOfMemoryError:
                fault = "the gradient in fp32 does not fit into the device's memory"
        fault = next((each for each in ranks.gather(fault) if each), "")
        return {part: each.summed(ranks) for part, each in found.items()}, fault

    def _tell(self, run: StageRun, agreements: dict[str, Agreement], rows: Sequence[Row], seconds: float) -> None:
        context = run.context
        config, ranks = context.config, context.ranks
        findings, precision = findings_of(agreements), config.engine.precision
        self._metrics.add_of_the_start(as_metrics(findings, seconds), seconds)
        (num_rows,) = ranks.sum([len(rows)])
        logger.info(
            f"{context.title}: numerics probe: gradient of {num_rows:.0f} rows in {precision} beside fp32:"
            f" {describe(findings)} ({seconds:.1f} s)"
        )
        is_first = config.objective.reader == "language" and image_is_first(rows, context.metadata.text.image_token_id)
        told = warning(findings, precision, image_is_first=any(ranks.gather(is_first)))
        if told and ranks.is_first:
            logger.warning(f"{context.title}: {told}")


def _reason_to_skip(run: StageRun) -> str:
    """Why no gradient in fp32 can be computed, the same on every rank; empty where it can."""
    engine, ranks, device = run.services.engine, run.context.ranks, run.context.device
    if is_quantized(engine.module):
        return "frozen weights are quantized, and have no fp32 form"
    needed = engine.probe_bytes() * (ranks.world_size if device.type == "cpu" else 1)  # ranks share a host's memory
    free = min(ranks.gather(free_bytes(device)))
    return f"fp32 takes {needed / 1e9:.1f} GB here, and {free / 1e9:.1f} GB are free" if needed > free else ""
