"""The scores of a run's stages, read from the files that `eval.run` wrote.

Owns: the names of a run's models, finding the results of each, aligning several models' answers to the same question,
    and refusing to compare results of different protocols. Does not own the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from eval.bootstrap import Interval, paired_interval
from eval.tasks.image_gain import NOT_LOOKED_AT
from models.common.documents import bare_name, read_as
from models.common.errors import InputError
from models.common.files import read_lines

Kind = Literal["untrained", "stage", "bundle"]
UNTRAINED = "before"
"""The quickstart's name of the model at the start of the first stage."""

QUANTIZED = ("nf4", "int8")
"""Bundles of the last stage, after the format that `tools.quantize` wrote them in."""

_SPELLED = {"lora": "LoRA", "nf4": "NF4"}


@dataclass(frozen=True)
class ScoredModel:
    """One of the models that a run may have evaluated, and its names."""

    name: str
    """Of its evaluation, RUN/eval/NAME.json, and of its entry in report.json."""
    kind: Kind

    @property
    def short(self) -> str:
        """For a card: `align`, `LoRA`, `NF4`."""
        return _SPELLED.get(self.name, self.name)

    @property
    def title(self) -> str:
        """For a table: `after LoRA`, `NF4 bundle`."""
        titles = {"untrained": "before training", "stage": f"after {self.short}", "bundle": f"{self.short} bundle"}
        return titles[self.kind]


def scored_models(stages: Iterable[str]) -> list[ScoredModel]:
    """The models of a run with these stages, in the order in which they are made."""
    trained = [ScoredModel(name, "stage") for name in stages]
    return [
        ScoredModel(UNTRAINED, "untrained"),
        *trained,
        *(ScoredModel(name, "bundle") for name in QUANTIZED if name not in stages),
    ]


class _Result(TypedDict):
    task: str
    shuffled: bool
    samples: str
    metrics: dict[str, float | None]
    intervals: dict[str, Any]


class _Evaluation(TypedDict):
    """OUT.json of `eval.run`."""

    results: list[_Result]


_SAMPLE: Any = dict[str, Any]


@dataclass(frozen=True)
class StageResult:
    """One model's evaluation: the content of `eval.run`'s OUT.json, and the folder of its samples."""

    model: ScoredModel
    evaluation: Mapping[str, Any]
    folder: Path

    @classmethod
    def read(cls, model: ScoredModel, path: Path) -> StageResult:
        """Read an OUT.json of `eval.run`.

        Raises:
            InputError: no such file, or it is not JSON.
        """
        return cls(model, read_as(path, _Evaluation, "make the evaluation again with eval.run"), path.parent)

    def result(self, task: str, *, shuffled: bool) -> Mapping[str, Any] | None:
        """The result of a task with the right images or with exchanged ones; None where it was not measured."""
        for result in self.evaluation["results"]:
            if result["task"] == task and result["shuffled"] == shuffled:
                found: Mapping[str, Any] = result
                return found
        return None

    def metric(self, task: str, name: str, *, shuffled: bool) -> float | None:
        """A metric, or None where it was not or could not be measured."""
        result = self.result(task, shuffled=shuffled)
        return None if result is None else result["metrics"].get(name)

    def interval(self, task: str, name: str, *, shuffled: bool) -> Mapping[str, float] | None:
        """A metric's bootstrap interval: low, high, level."""
        result = self.result(task, shuffled=shuffled)
        return None if result is None else result["intervals"].get(name)

    def samples(self, task: str, *, shuffled: bool = False) -> list[dict[str, Any]]:
        """The samples of a task, in the order of the split; none where it was not measured."""
        return self._all_samples.get((task, shuffled), [])

    @cached_property
    def _all_samples(self) -> dict[tuple[str, bool], list[dict[str, Any]]]:
        found = {}
        for result in self.evaluation["results"]:
            path = self.folder / bare_name(result["samples"], self.folder, "samples")
            if not path.is_file():
                raise InputError(f"{path} is missing; run eval.run again")
            found[result["task"], result["shuffled"]] = read_lines(path, _SAMPLE)
        return found

    def summary(self) -> dict[str, float | None]:
        """This stage's entry in report.json: accuracies in per cent, CIDEr on coco-caption's scale."""
        return {
            "vqa_accuracy": self.metric("vqa", "vqa_accuracy", shuffled=False),
            "vqa_accuracy_shuffled": self.metric("vqa", "vqa_accuracy", shuffled=True),
            "cider": self.metric("caption", "CIDEr", shuffled=False),
            "cider_shuffled": self.metric("caption", "CIDEr", shuffled=True),
        }

    @property
    def advice(self) -> str:
        """What to try where a trained model does not look at images; empty where it does, or nothing tells."""
        if self.model.kind == "untrained":
            return ""
        measured, points = self.interval("image_gain", "image_gain", shuffled=False), self.gain()
        low = measured["low"] if measured is not None else points.low if points is not None else 1.0
        return NOT_LOOKED_AT if low <= 0 else ""

    def gain(self) -> Interval | None:
        """Points of VQA accuracy above exchanged images, question by question; None where one is not measured."""
        return _difference(self.samples("vqa"), self.samples("vqa", shuffled=True))


def change(later: StageResult, earlier: StageResult) -> Interval | None:
    """Points of VQA accuracy by which `later` differs from `earlier`, question by question."""
    return _difference(later.samples("vqa"), earlier.samples("vqa"))


def _difference(after: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> Interval | None:
    if not after or not before:
        return None
    percents = [[100 * sample["accuracy"] for sample in samples] for samples in (after, before)]
    return paired_interval(percents[0], percents[1], clusters=[sample["picture"] for sample in after])


def last_stage(stages: Mapping[str, StageResult]) -> StageResult:
    """The run's final result: the last stage that was trained; where none was scored, the last model."""
    trained = [stage for stage in stages.values() if stage.model.kind == "stage"]
    return (trained or list(stages.values()))[-1]


def losses_of_bundles(stages: Mapping[str, StageResult]) -> list[tuple[StageResult, StageResult, Interval]]:
    """(bundle, the stage it was made from, points of VQA accuracy that it differs by), where both were asked."""
    last = last_stage(stages)
    pairs = [(stage, last) for stage in stages.values() if stage.model.kind == "bundle" and last.model.kind == "stage"]
    return [(bundle, stage, found) for bundle, stage in pairs if (found := change(bundle, stage)) is not None]


def check_protocols(stages: Mapping[str, StageResult]) -> None:
    """Check that all figures can be compared.

    Raises:
        InputError: no model at all, or two that were measured by different protocols.
    """
    if not stages:
        raise InputError("a report needs at least one evaluation; make them with eval.run")
    for task in ("vqa", "caption"):
        protocols: dict[str, str] = {}
        for name, stage in stages.items():
            for shuffled in (False, True):
                result = stage.result(task, shuffled=shuffled)
                if result is not None:
                    protocols.setdefault(result["protocol"], name)
        if len(protocols) > 1:
            one, other, *_ = protocols.values()
            raise InputError(
                f"the {task} figures of stages {one} and {other} do not compare: prompt, decoding, "
                "normalisation or questions differ; measure them again with the same suite"
            )


@dataclass(frozen=True)
class AnsweredSample:
    """One image, what was asked, each stage's answer, and its accuracy in [0, 1] (None for captions)."""

    image: Path
    question: str
    references: tuple[str, ...]
    answers: Mapping[str, str]
    accuracies: Mapping[str, float | None]


def answered_samples(stages: Mapping[str, StageResult], task: str) -> list[AnsweredSample]:
    """Every model's answer to each sample of a task, with the right images; by the models' short names."""
    rows = {stage.model.short: samples for stage in stages.values() if (samples := stage.samples(task))}
    return [
        AnsweredSample(
            image=Path(first["picture"]),
            question=first.get("question", ""),
            references=tuple(dict.fromkeys(first.get("human_answers") or first["references"])),
            answers={name: samples[place]["answer"] for name, samples in rows.items()},
            accuracies={name: samples[place].get("accuracy") for name, samples in rows.items()},
        )
        for place, first in enumerate(next(iter(rows.values()), []))
    ]
