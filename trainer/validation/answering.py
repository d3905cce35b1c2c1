"""Answers that a model under training writes: to a few fixed images, and to the questions of benchmarks."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from eval.live import LiveModel
from eval.predictor import Decoding, Predictor, Query, Turn
from eval.tasks.result import Task
from eval.tasks.unasked import ask_places, reasons_in, without
from trainer.distributed.context import DistributedContext
from trainer.engine.train_step import TrainingTask
from trainer.validation.agreement import ShouldStop, divided
from trainer.validation.answers_page import Answered
from trainer.validation.measure import Measure, metric_name
from trainer.validation.pair_encoder import PairEncoder


class WholeWeights(Protocol):
    """The part of the engine that answering needs."""

    def whole_weights(self) -> AbstractContextManager[Any]:
        """In this context every rank has every whole parameter, and a forward makes no collective call."""


class Answering:
    """Answers the fixed images and scores the tasks, divided over the ranks."""

    def __init__(
        self,
        measure: Measure,
        module: TrainingTask,
        engine: WholeWeights,
        ranks: DistributedContext,
        device: torch.device,
    ) -> None:
        self.answers: list[Answered] = []
        """The fixed images of the last finished `run` with their answers, on the first rank."""
        self.notes: dict[str, str] = {}
        """What the tasks of the last `run` said beside their metrics, by name, on the first rank."""
        self._measure, self._module, self._engine = measure, module, engine
        self._ranks, self._device = ranks, device

    def run(self, should_stop: ShouldStop) -> dict[str, float]:
        """Answer the fixed images, and return the tasks' metrics. `should_stop` is called before every token.

        Raises:
            InputError: on every rank, if one cannot answer.
            Interrupted: on every rank, if one was asked to stop.
        """
        measure = self._measure
        if not measure.examples and not measure.tasks:
            return {}
        metrics: dict[str, float] = {}
        answers: list[str] = []
        self.notes = {}
        with self._engine.whole_weights():
            model: Any = self._encoder(should_stop) if measure.is_compared else self._predictor(should_stop)
            if measure.examples:
                answers = divided(self._ranks, len(measure.examples), lambda share: self._show(model, share))
            for task in measure.tasks:
                metrics |= self._score(task, model)
        self.answers = [Answered(*pair) for pair in zip(measure.examples, answers, strict=True)]
        return metrics

    def _predictor(self, should_stop: ShouldStop) -> Predictor:
        serving = self._measure.serving
        assert serving is not None, "open_measure made it where something is answered"
        live = LiveModel(
            self._module.vlm,
            generation_config=serving.generation_config,
            autocast=self._module.dtype,
            should_stop=should_stop,
        )
        return Predictor(live, serving.processor, device=self._device)

    def _encoder(self, should_stop: ShouldStop) -> PairEncoder:
        return PairEncoder(
            self._module.vlm,
            self._measure.held_out.encoder,
            autocast=self._module.dtype,
            device=self._device,
            should_stop=should_stop,
        )

    def _show(self, predictor: Predictor, share: range) -> list[str]:
        examples = [self._measure.examples[place] for place in share]
        queries = [Query((example.image,), (Turn("user", example.question),)) for example in examples]
        decoding = Decoding(max_new_tokens=self._measure.config.max_new_tokens)
        return predictor.answer(queries, decoding, batch_size=self._measure.micro_rows) if queries else []

    def _score(self, task: Task, model: Any) -> dict[str, float]:
        """A task's metrics; those that cannot be computed are left out. The first rank scores for all."""
        answered = divided(self._ranks, task.num_samples, lambda share: self._ask(task, model, share))
        reasons = reasons_in(task, answered)
        metrics: dict[str, float] = {}
        if self._ranks.is_first:
            result = task.score(without(reasons, answered))
            metrics = {metric_name(task, name): value for name, value in result.metrics.items() if value is not None}
            notes = [str(result.details["note"])] if "note" in result.details else []
            if reasons:
                notes.append(f"{len(reasons)} questions cannot be asked, the first: {reasons[min(reasons)]}")
            if notes:
                self.notes[task.name] = "; ".join(notes)
        scored: dict[str, float] = self._ranks.gather(metrics)[0]
        return scored

    def _ask(self, task: Task, model: Any, share: range) -> list[Any]:
        """This rank's share in batches, with a progress bar on a terminal."""
        from tqdm import tqdm

        size, is_shown = self._measure.micro_rows, self._ranks.is_first and sys.stderr.isatty()
        found: list[Any] = []
        for start in tqdm(share[::size], desc=task.name, unit="batch", leave=False, disable=not is_shown):
            found += ask_places(task, model, size, range(start, min(start + size, share.stop)))
        return found
