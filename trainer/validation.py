"""Validation during training: what a stage has learnt so far, measured on data that it does not learn from.

    every rank: its share of the held-out samples -> engine.evaluate -> sums -> all-reduced -> loss
                                                                    -> embeddings -> gathered -> retrieval, a grid
                its share of the pictures and of each task -> answers -> gathered -> scored by the first rank
    RUN/STAGE/validation/step_000500.html    the pictures with their answers, and the numbers
    RUN/STAGE/validation/unusable.jsonl      held-out samples that could not be used, with their reason

Nothing of the run is changed: modes, random streams and the data stream are afterwards as they were.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

from data_pipeline.batch import Batch, collate
from data_pipeline.sample import BadSample, Encoded
from eval.live import InterruptedAnswerError, LiveModel
from eval.predictor import Decoding, Predictor, Query, Turn
from eval.tasks import make_task
from eval.tasks.result import Task
from models.build import Facts
from models.errors import InputError
from models.files import LineFile
from trainer.answers_page import Answered, write_answers
from trainer.config import Validation
from trainer.held_out import HeldOut, live_processor
from trainer.loss_sum import Embeddings, LossSum
from trainer.pages import expendable
from trainer.ranks import Ranks
from trainer.recipe import Recipe
from trainer.retrieval import METRICS, draw_grid, measure
from trainer.step import TrainStep

GRID_PAIRS = 8
"""Pairs in the picture of similarities."""

ShouldStop = Callable[[], bool]
"""Whether THIS rank was asked to stop: a flag, no collective. Ranks need not agree; validation makes them agree."""


class Evaluating(Protocol):
    """What validation needs of the engine."""

    def evaluate(self, batch: Batch) -> LossSum:
        """The sums of one micro-batch, without a gradient and without dropout."""

    def whole_weights(self) -> AbstractContextManager[Any]:
        """Within it every parameter is whole on every rank, and a forward makes no collective call."""


class Measure:
    """What a stage validates on, read and checked before the ranks meet; no model is needed yet.

    Raises InputError where a file is missing or `validation.metric` names nothing that will be measured.
    """

    def __init__(self, recipe: Recipe, stage: str, config: Validation, facts: Facts) -> None:
        self.config = config
        self.title = f"{recipe.name}/{stage}"
        self.text = facts.text
        self.micro_rows = recipe.stage(stage).batch.micro_rows
        self.held_out = HeldOut(config.data, facts, config.num_samples)
        self.is_compared = is_compared = recipe.stage(stage).objective.reader == "projector"
        if is_compared and (config.generate or config.tasks):
            raise InputError(
                f"stages.{stage}.validation: no language model answers in this stage: leave out generate, tasks"
            )
        self.compared = {each.key: each for each in self.held_out.examples(GRID_PAIRS if is_compared else 0)}
        """Pairs that are shown with their similarities, where the objective compares pictures and texts."""
        self.examples = self.held_out.examples(config.generate)
        self.tasks: list[Task] = [make_task(task) for task in config.tasks]
        self.processor, self.generation_config = None, None
        if self.examples or self.tasks:
            self.processor, self.generation_config = live_processor(recipe.model, facts, self.held_out)
        names = [
            "validation/loss",
            *(f"validation/{name}" for name in (METRICS if is_compared else ["token_accuracy"])),
        ]
        names += [_metric_name(task, metric) for task in self.tasks for metric in task.metric_names]
        if len(set(names)) < len(names):
            raise InputError(f"stages.{stage}.validation.tasks: two tasks have one name: give one a `name`")
        if config.metric not in names:
            raise InputError(
                f"stages.{stage}.validation.metric: {config.metric} is not measured; there are {', '.join(names)}"
            )


def open_measure(recipe: Recipe, stage: str, facts: Facts) -> Measure | None:
    """What `stage` validates on, or None where it does not validate."""
    config = recipe.stage(stage).validation
    return None if config is None else Measure(recipe, stage, config, facts)


def _metric_name(task: Task, metric: str) -> str:
    return f"validation/{task.name}/{metric.lower()}"


class Interrupted(Exception):  # noqa: N818 - not an error: a run that was asked to stop
    """Some rank was asked to stop; every rank raises it at the same place."""


class Validator:
    """Measures a stage's model; every rank calls `run` at the same step."""

    def __init__(
        self,
        measure: Measure,
        *,
        module: TrainStep,
        engine: Evaluating,
        ranks: Ranks,
        device: torch.device,
        directory: Path,
    ) -> None:
        self.answers: list[Answered] = []
        """The pictures of the last finished `run` with their answers, on the first rank."""
        self.grid: Image.Image | None = None
        """The similarities of its first pairs, where the objective compares pictures and texts."""
        self._measure, self._module, self._engine = measure, module, engine
        self._ranks, self._device, self._directory = ranks, device, directory / "validation"
        self._named: set[tuple[str, str]] = set()
        self._unusable = LineFile(self._directory / "unusable.jsonl")
        self._shows_progress = ranks.is_first and sys.stderr.isatty()

    def run(self, steps: int, should_stop: ShouldStop) -> dict[str, float] | None:
        """Measure after `steps` optimizer steps: the same numbers on every rank, or None where a rank must stop.

        `should_stop` is asked on each rank between batches and before every token of an answer.
        Raises InputError on every rank where the held-out data cannot be used.
        """
        started_s = time.monotonic()
        try:
            with undisturbed(self._module, self._device):
                metrics = self._loss(should_stop)
                metrics |= self._answer_all(should_stop)
        except Interrupted:
            return None
        finally:
            self._measure.held_out.forget()
        if self._measure.config.metric not in metrics:
            raise InputError(f"{self._measure.config.metric} could not be measured: validate on more samples, or Java?")
        metrics["validation/seconds"] = self._ranks.gather(time.monotonic() - started_s)[0]
        if self._ranks.is_first:
            title, page = f"{self._measure.title}, step {steps}", self._directory / f"step_{steps:06d}.html"
            with expendable(page):
                write_answers(page, title, metrics, self.answers, grid=self.grid)
                if self.grid is not None:
                    self.grid.save(page.with_suffix(".png"))
        return metrics

    def close(self) -> None:
        """End the data workers."""
        self._measure.held_out.close()
        self._unusable.close()

    def _loss(self, should_stop: ShouldStop) -> dict[str, float]:
        """Loss and token accuracy over all targets of the held-out samples. Every rank runs as many batches."""
        share = self._ranks.share(self._measure.held_out.num_samples)
        size = self._measure.micro_rows
        longest = max(
            len(Ranks(rank, self._ranks.world_size).share(self._measure.held_out.num_samples))
            for rank in range(self._ranks.world_size)
        )
        samples = self._measure.held_out.encoded(share)
        embeddings: list[tuple[list[str], Embeddings]] = []
        sums = torch.zeros(5, dtype=torch.float64)
        for start in self._progress(range(0, longest, size), "validation"):
            fault = ""
            rows: list[tuple[Encoded, ...]] = []
            try:
                rows = self._rows(samples, min(size, len(share) - start))
            except InputError as error:
                fault = str(error)
            self._agree(should_stop, fault)
            batch = collate([*rows, *[()] * (size - len(rows))], self._measure.text)
            found = self._engine.evaluate(batch.to(self._device))
            local = (found.loss_sum, found.num_correct, batch.num_targets, len(rows), 0)
            sums += torch.tensor([float(value) for value in local], dtype=torch.float64)
            if found.embeddings is not None:
                keys = [name for names in batch.keys for name in names]
                embeddings.append((keys, Embeddings(*(value.float().cpu() for value in found.embeddings))))
        sums[4] = len(share) - sums[3]
        loss, correct, targets, num_samples, num_unusable = self._ranks.sum(sums.tolist())
        if targets == 0:
            raise InputError("validation.data: no sample of it can be used; see validation/unusable.jsonl")
        counts = {"validation/samples": num_samples, "validation/unusable_samples": num_unusable}
        if self._measure.is_compared:
            return {"validation/loss": loss / targets, **self._retrieval(embeddings), **counts}
        return {"validation/loss": loss / targets, "validation/token_accuracy": correct / targets, **counts}

    def _retrieval(self, found: list[tuple[list[str], Embeddings]]) -> dict[str, float]:
        """Recall over the pairs of all ranks, and the contrastive loss over them at once; none without embeddings."""
        everything = [part for share in self._ranks.gather(found) for part in share]
        if not everything:
            return {}
        keys = [key for names, _ in everything for key in names]
        parts = [embeddings for _, embeddings in everything]
        pictures, texts = (torch.cat(values) for values in zip(*(part[:2] for part in parts), strict=True))
        metrics, scores_NN = measure(Embeddings(pictures, texts, parts[0].scale))
        shown = [key for key in keys if key in self._measure.compared][:GRID_PAIRS]
        examples, places = [self._measure.compared[key] for key in shown], [keys.index(key) for key in shown]
        pictures_shown, texts_shown = [each.picture for each in examples], [each.reference for each in examples]
        self.grid = draw_grid(pictures_shown, texts_shown, scores_NN[places][:, places]) if shown else None
        return {f"validation/{name}": value for name, value in metrics.items()}

    def _rows(self, samples: Iterator[Encoded | BadSample], count: int) -> list[tuple[Encoded, ...]]:
        """The usable ones among the next `count` samples, each a row; the others are named."""
        rows: list[tuple[Encoded, ...]] = []
        for _ in range(count):
            sample = next(samples)
            if isinstance(sample, Encoded):
                rows.append((sample,))
                continue
            if sample.kind == "too_long" and self._measure.held_out.too_long_is_error:
                raise InputError(f"validation.data: {sample.shard} {sample.key}: {sample.reason}")
            self._name_unusable(sample)
        return rows

    def _name_unusable(self, sample: BadSample) -> None:
        if (sample.shard, sample.key) in self._named:
            return
        self._named.add((sample.shard, sample.key))
        self._unusable.write({"shard": sample.shard, "key": sample.key, "reason": sample.reason})

    def _answer_all(self, should_stop: ShouldStop) -> dict[str, float]:
        """Answers to the fixed pictures, and the tasks' metrics."""
        measure = self._measure
        if not measure.examples and not measure.tasks:
            return {}
        with self._engine.whole_weights():
            live = LiveModel(
                self._module.vlm,
                generation_config=measure.generation_config,
                autocast=self._module.dtype,
                should_stop=should_stop,
            )
            predictor = Predictor(live, measure.processor, device=self._device)
            answers = self._shared(len(measure.examples), lambda share: self._show(predictor, share))
            metrics: dict[str, float] = {}
            for task in measure.tasks:
                metrics |= self._score(task, predictor)
        pairs = zip(measure.examples, answers, strict=True)
        self.answers = [Answered(example, answer) for example, answer in pairs]
        return metrics

    def _show(self, predictor: Predictor, share: range) -> list[str]:
        queries = [
            Query((example.picture,), (Turn("user", example.question),))
            for example in (self._measure.examples[place] for place in share)
        ]
        decoding = Decoding(max_new_tokens=self._measure.config.max_new_tokens)
        return predictor.answer(queries, decoding, batch_size=self._measure.micro_rows) if queries else []

    def _score(self, task: Task, predictor: Predictor) -> dict[str, float]:
        """A task's metrics; what could not be computed is left out. The first rank scores for all."""
        size = self._measure.micro_rows
        answers = self._shared(
            task.num_samples,
            lambda share: task.ask(predictor, size, share, progress=self._shows_progress) if share else [],
        )
        metrics: dict[str, float] = {}
        if self._ranks.is_first:
            found = task.score(answers).metrics
            metrics = {_metric_name(task, name): value for name, value in found.items() if value is not None}
        scored: dict[str, float] = self._ranks.gather(metrics)[0]
        return scored

    def _shared(self, count: int, ask: Callable[[range], list[Any]]) -> list[Any]:
        """`ask` for this rank's share of `count` places; the answers of all ranks in order, on every rank."""
        answers: list[Any] | None = None
        fault = ""
        try:
            answers = ask(self._ranks.share(count))
        except InterruptedAnswerError:
            pass
        except InputError as error:
            fault = str(error)
        shares = self._ranks.gather((answers, fault))
        _raise_first([other for _, other in shares])
        if any(share is None for share, _ in shares):
            raise Interrupted
        return [answer for share, _ in shares for answer in share]

    def _agree(self, should_stop: ShouldStop, fault: str) -> None:
        """Raise on every rank what any of them has to raise."""
        stops, faults = self._ranks.sum([float(should_stop()), float(bool(fault))])
        if faults:
            _raise_first(self._ranks.gather(fault))
        if stops:
            raise Interrupted

    def _progress(self, batches: range, label: str) -> Iterator[int]:
        from tqdm import tqdm

        yield from tqdm(batches, desc=label, unit="batch", leave=False, disable=not self._shows_progress)


def _raise_first(faults: list[str]) -> None:
    for rank, fault in enumerate(faults):
        if fault:
            raise InputError(f"validation, rank {rank}: {fault}")


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in its own mode and torch's generators stand as before."""
    modes = [(each, each.training) for each in module.modules()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        module.eval()
        try:
            yield
        finally:
            for each, mode in modes:
                each.training = mode
