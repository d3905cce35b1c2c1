"""What the stages of a run scored, read from the files that `eval.run` wrote.

Owns: finding a stage's four results, lining up what several stages said to the same question, and refusing to set
results of different protocols side by side. Does not own the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.bootstrap import Interval, paired_interval
from models.errors import InputError

STAGES: dict[str, str] = {
    "before": "before alignment",
    "align": "after align",
    "lora": "after LoRA",
    "nf4": "NF4 bundle",
}
"""The stages that a report knows, in the order of the run, and what they are called on the page."""
SHORT_NAMES: dict[str, str] = {"before": "before", "align": "align", "lora": "LoRA", "nf4": "NF4"}


@dataclass(frozen=True)
class StageResult:
    """One stage's evaluation: what OUT.json of `eval.run` holds, and the folder where its samples lie."""

    evaluation: Mapping[str, Any]
    folder: Path

    @classmethod
    def read(cls, path: Path) -> StageResult:
        """Read an OUT.json of `eval.run`; raises InputError where there is none."""
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")), path.parent)
        except FileNotFoundError:
            raise InputError(f"{path}: no such evaluation; make it with eval.run") from None
        except ValueError as error:
            raise InputError(f"{path} is not an evaluation: {error}") from None

    def result(self, task: str, *, shuffled: bool) -> Mapping[str, Any] | None:
        """The result of a task with the right pictures or with exchanged ones; None where it was not measured."""
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
            path = self.folder / result["samples"]
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except FileNotFoundError:
                raise InputError(f"{path} is missing; run eval.run again") from None
            found[result["task"], result["shuffled"]] = [json.loads(line) for line in lines]
        return found

    def summary(self) -> dict[str, float | None]:
        """This stage's entry in report.json: accuracies in per cent, CIDEr on coco-caption's scale."""
        return {
            "vqa_accuracy": self.metric("vqa", "vqa_accuracy", shuffled=False),
            "vqa_accuracy_shuffled": self.metric("vqa", "vqa_accuracy", shuffled=True),
            "cider": self.metric("caption", "CIDEr", shuffled=False),
            "cider_shuffled": self.metric("caption", "CIDEr", shuffled=True),
        }

    def gain(self) -> Interval | None:
        """Points of VQA accuracy above exchanged pictures, question by question; None where one is not measured."""
        return _difference(self.samples("vqa"), self.samples("vqa", shuffled=True))


def change(later: StageResult, earlier: StageResult) -> Interval | None:
    """Points of VQA accuracy by which `later` differs from `earlier`, question by question."""
    return _difference(later.samples("vqa"), earlier.samples("vqa"))


def _difference(after: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> Interval | None:
    if not after or not before:
        return None
    percents = [[100 * sample["accuracy"] for sample in samples] for samples in (after, before)]
    return paired_interval(percents[0], percents[1], clusters=[sample["picture"] for sample in after])


def check_stages(stages: Mapping[str, StageResult]) -> dict[str, StageResult]:
    """The stages in the order of the run.

    Raises:
        InputError: none, an unknown stage, or stages whose figures do not compare.
    """
    unknown = [name for name in stages if name not in STAGES]
    if unknown or not stages:
        raise InputError(f"a report is of the stages {', '.join(STAGES)}; found {', '.join(unknown) or 'none'}")
    ordered = {name: stages[name] for name in STAGES if name in stages}
    for task in ("vqa", "caption"):
        protocols: dict[str, str] = {}
        for name, stage in ordered.items():
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
    return ordered


@dataclass(frozen=True)
class AnsweredSample:
    """One picture, what was asked, what each stage said, and how right that was in [0, 1] (None for captions)."""

    picture: Path
    question: str
    references: tuple[str, ...]
    answers: Mapping[str, str]
    accuracies: Mapping[str, float | None]


def answered_samples(stages: Mapping[str, StageResult], task: str) -> list[AnsweredSample]:
    """What every stage said to each sample of a task, with the right pictures."""
    rows = {name: samples for name, stage in stages.items() if (samples := stage.samples(task))}
    return [
        AnsweredSample(
            picture=Path(first["picture"]),
            question=first.get("question", ""),
            references=tuple(dict.fromkeys(first.get("human_answers") or first["references"])),
            answers={name: samples[place]["answer"] for name, samples in rows.items()},
            accuracies={name: samples[place].get("accuracy") for name, samples in rows.items()},
        )
        for place, first in enumerate(next(iter(rows.values()), []))
    ]
