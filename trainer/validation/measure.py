"""The inputs of a stage's validation: read and checked before the ranks join; no model is needed yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eval.recall import METRICS
from eval.tasks import make_task
from eval.tasks.result import Task
from models.build import ModelMetadata
from models.common.errors import InputError
from models.spec import TextSpec
from trainer.config.errors import nearest
from trainer.config.recipe import Recipe
from trainer.config.schema import Validation
from trainer.validation.held_out import Example, HeldOut, live_processor

GRID_PAIRS = 8
"""Pairs in the image of similarities."""


@dataclass(frozen=True)
class Serving:
    """The processor and generation config of a bundle of the stage, so that prompts are as in serving."""

    processor: Any
    generation_config: Any


@dataclass(frozen=True)
class Measure:
    """The inputs of a stage's validation."""

    config: Validation
    title: str
    """recipe/stage, for pages."""
    text: TextSpec
    micro_rows: int
    held_out: HeldOut
    is_compared: bool
    """Whether the objective compares images and texts, so that retrieval is measured."""
    compared: Mapping[str, Example]
    """By key: the pairs that are shown with their similarities."""
    examples: list[Example]
    """The images that are answered for the page."""
    tasks: list[Task]
    serving: Serving | None
    """None where nothing is answered."""

    @property
    def basis(self) -> str:
        """The metric that checkpoints are compared by, and a digest of what it is measured on."""
        task = next((task for task in self.tasks if self.config.metric.startswith(f"validation/{task.name}/")), None)
        facts: dict[str, Any] = {"fingerprint": self.held_out.fingerprint, "num_samples": self.held_out.num_samples}
        facts |= self.config.data.model_dump(mode="json", include={"template", "control_tokens", "max_length"})
        if task is not None:
            facts = task.config.model_dump(mode="json")
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return f"{self.config.metric} {digest[:12]}"


def open_measure(recipe: Recipe, stage: str, metadata: ModelMetadata) -> Measure | None:
    """The inputs of `stage`'s validation, or None where it does not validate.

    Raises:
        InputError: a file is missing, or `validation.metric` names nothing that will be measured.
    """
    config = recipe.stage(stage).validation
    if config is None:
        return None
    held_out = HeldOut.open(config.data, metadata, config.num_samples)
    is_compared = recipe.stage(stage).objective.reader == "projector"
    if is_compared and config.generate:
        raise InputError(f"stages.{stage}.validation: no language model answers in this stage: leave out generate")
    examples, tasks = held_out.examples(config.generate), [make_task(task) for task in config.tasks]
    _check_tasks(stage, tasks, is_compared)
    _check_metric(stage, config, tasks, is_compared)
    return Measure(
        config=config,
        title=f"{recipe.name}/{stage}",
        text=metadata.text,
        micro_rows=recipe.stage(stage).batch.micro_rows,
        held_out=held_out,
        is_compared=is_compared,
        compared={each.key: each for each in held_out.examples(GRID_PAIRS if is_compared else 0)},
        examples=examples,
        tasks=tasks,
        serving=None
        if is_compared or not (examples or tasks)
        else Serving(*live_processor(recipe.model, metadata, held_out)),
    )


def _check_tasks(stage: str, tasks: list[Task], is_compared: bool) -> None:
    """Raise InputError for a task that this stage's model cannot be asked."""
    wrong = next((task.name for task in tasks if task.compares_vectors != is_compared), None)
    if wrong is not None:
        reason = (
            "no language model answers in this stage: it measures retrieval alone"
            if is_compared
            else "it compares vectors of images and texts, which only a stage with the objective image_text trains"
        )
        raise InputError(f"stages.{stage}.validation.tasks: {wrong}: {reason}")


def _check_metric(stage: str, config: Validation, tasks: list[Task], is_compared: bool) -> None:
    names = ["validation/loss", *(f"validation/{name}" for name in (METRICS if is_compared else ["token_accuracy"]))]
    names += [metric_name(task, metric) for task in tasks for metric in task.metric_names]
    if len(set(names)) < len(names):
        raise InputError(f"stages.{stage}.validation.tasks: two tasks have one name: give one a `name`")
    if config.metric not in names:
        raise InputError(
            f"stages.{stage}.validation.metric: {config.metric} is not measured; there are {', '.join(names)}"
            f"{nearest(config.metric, names)}"
        )


def metric_name(task: Task, metric: str) -> str:
    """The name of a task's metric in logs and in `validation.metric`."""
    return f"validation/{task.name}/{metric.lower()}"
