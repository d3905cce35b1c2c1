"""Validation during training, on data that the stage is not trained on.

    every rank: its share of the held-out samples -> engine.evaluate -> sums -> all-reduced -> loss
                                                                    -> embeddings -> gathered -> retrieval, a grid
                its share of the images and of each task -> answers -> gathered -> scored by the first rank
    RUN/STAGE/validation/step_000500.html    the images with their answers, and the numbers
    RUN/STAGE/validation/unusable.jsonl      held-out samples that could not be used, with their reason

The run is not changed: module modes, random streams and the data stream are restored.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from models.common.errors import InputError
from models.common.files import LineFile
from trainer.distributed.context import DistributedContext
from trainer.engine.train_step import TrainingTask
from trainer.validation.agreement import Interrupted, ShouldStop
from trainer.validation.answering import Answering, WholeWeights
from trainer.validation.answers_page import Answered, write_answers
from trainer.validation.held_out_loss import Evaluating, HeldOutLoss
from trainer.validation.html_report import best_effort
from trainer.validation.measure import Measure

logger = logging.getLogger(__name__)


class ValidationEngine(Evaluating, WholeWeights, Protocol):
    """The part of the engine that validation needs."""


class Validator:
    """Measures a stage's model; every rank calls `run` at the same step."""

    def __init__(
        self,
        measure: Measure,
        *,
        module: TrainingTask,
        engine: ValidationEngine,
        ranks: DistributedContext,
        device: torch.device,
        directory: Path,
    ) -> None:
        self._measure, self._module, self._ranks, self._device = measure, module, ranks, device
        self._directory = directory / "validation"
        self._unusable = LineFile(self._directory / "unusable.jsonl")
        self._loss = HeldOutLoss(measure, engine, ranks, device, self._unusable)
        self._answering = Answering(measure, module, engine, ranks, device)

    @property
    def answers(self) -> list[Answered]:
        """The images of the last finished `run` with their answers, on the first rank."""
        return self._answering.answers

    def run(self, steps: int, should_stop: ShouldStop) -> dict[str, float] | None:
        """Measure after `steps` optimizer steps: the same numbers on every rank, or None where a rank must stop.

        Args:
            should_stop: asked on each rank between batches and before every token of an answer.

        Raises:
            InputError: on every rank, where the held-out data cannot be used.
        """
        started_s, measure = time.monotonic(), self._measure
        try:
            with undisturbed(self._module, self._device):
                metrics = self._loss.run(should_stop)
                metrics |= self._answering.run(should_stop)
        except Interrupted:
            return None
        finally:
            measure.held_out.forget()
        if measure.config.metric not in metrics:
            raise InputError(f"{measure.config.metric} could not be measured: validate on more samples, or Java?")
        metrics["validation/seconds"] = self._ranks.gather(time.monotonic() - started_s)[0]
        for name, note in self._answering.notes.items():
            logger.info(f"{measure.title}, step {steps}: {name}: {note}")
        if self._ranks.is_first:
            self._write_page(steps, metrics)
        return metrics

    def close(self) -> None:
        """End the data workers."""
        self._measure.held_out.close()
        self._unusable.close()

    def _write_page(self, steps: int, metrics: dict[str, float]) -> None:
        title, page = f"{self._measure.title}, step {steps}", self._directory / f"step_{steps:06d}.html"
        grid = self._loss.grid
        with best_effort(page):
            write_answers(page, title, metrics, self.answers, notes=self._answering.notes, grid=grid)
            if grid is not None:
                grid.save(page.with_suffix(".png"))


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's mode and torch's generators are restored."""
    modes = [(each, each.training) for each in module.modules()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        module.eval()
        try:
            yield
        finally:
            for each, mode in modes:
                each.training = mode
