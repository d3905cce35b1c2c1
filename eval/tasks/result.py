"""What a task is, what it needs of a model, and what it gives back.

Owns: the `Task` and `Answerer` contracts, `TaskResult`, the protocol that makes two results comparable, and asking a
model batch by batch. Does not own what a task measures, or files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from eval.bootstrap import Interval
from models.spec import Config

if TYPE_CHECKING:
    from eval.predictor import Decoding, Query


class Answerer(Protocol):
    """What a task needs of an `eval.predictor.Predictor`."""

    def answer(self, queries: Sequence[Query], decoding: Decoding) -> list[str]:
        """One answer to each query."""

    def loss(self, queries: Sequence[Query], answers: Sequence[str]) -> list[tuple[float, int]]:
        """Of each answer: summed negative log-likelihood in nats, number of tokens."""


@dataclass(frozen=True)
class TaskResult:
    """One measurement. Two results compare only where their `protocol` is the same.

    `facts` is what the protocol is made of; `details` are breakdowns and reasons; `samples` go to a JSONL file.
    """

    task: str
    name: str
    metrics: Mapping[str, float | None]
    intervals: Mapping[str, Interval]
    facts: Mapping[str, Any]
    shuffled: bool
    samples: Sequence[Mapping[str, Any]]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def protocol(self) -> str:
        """Hash over prompt, decoding, normalisation and the split's digests: what else may not differ in a comparison.

        Exchanged pictures are not part of it: they are what such a result is compared for.
        """
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the samples."""
        return {
            "task": self.task,
            "name": self.name,
            "shuffled": self.shuffled,
            "num_samples": len(self.samples),
            "metrics": dict(self.metrics),
            "intervals": {name: interval.as_dict() for name, interval in self.intervals.items()},
            "protocol": self.protocol,
            "protocol_facts": dict(self.facts),
            **self.details,
        }


class Task(Protocol):
    """A benchmark whose files are read and checked; `run` needs only a model."""

    name: str
    metric_names: tuple[str, ...]
    """What its result's `metrics` holds."""

    @property
    def config(self) -> Config:
        """What it was made from."""

    @property
    def num_samples(self) -> int:
        """How many samples it asks about."""

    def ask(self, predictor: Answerer, batch_size: int, places: range, *, progress: bool = True) -> list[Any]:
        """What the model says to some of the samples, one small picklable value each: a rank's share of the work."""

    def score(self, answers: Sequence[Any]) -> TaskResult:
        """The measurement, from what `ask` gave for all samples in their order; needs no model."""

    def run(self, predictor: Answerer, batch_size: int) -> TaskResult:
        """Ask about every sample, then score; shows progress."""


def greedy(max_new_tokens: int) -> Decoding:
    """The decoding that benchmarks use."""
    from eval.predictor import Decoding

    return Decoding(max_new_tokens=max_new_tokens)


def decoding_facts(max_new_tokens: int) -> dict[str, Any]:
    """`greedy`, for a protocol."""
    return {"max_new_tokens": max_new_tokens, "temperature": 0.0, "num_beams": 1}


def answer_all(
    predictor: Answerer,
    pictures: Sequence[Path],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str | None,
) -> list[str]:
    """Greedy answers, one to each (picture, prompt). Progress is shown under `label`; None shows none."""
    decoding = greedy(max_new_tokens)
    answers: list[str] = []
    for batch in _batches(len(prompts), batch_size, label):
        answers += predictor.answer(_queries(pictures[batch], prompts[batch]), decoding)
    return answers


def loss_all(
    predictor: Answerer,
    pictures: Sequence[Path],
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int,
    label: str | None,
) -> list[tuple[float, int]]:
    """Summed loss in nats and number of tokens of each answer, given its picture and prompt."""
    losses: list[tuple[float, int]] = []
    for batch in _batches(len(prompts), batch_size, label):
        losses += predictor.loss(_queries(pictures[batch], prompts[batch]), answers[batch])
    return losses


def _batches(num_samples: int, batch_size: int, label: str | None) -> Iterator[slice]:
    from tqdm import tqdm

    with tqdm(total=num_samples, desc=label, unit="sample", disable=label is None) as bar:
        for start in range(0, num_samples, batch_size):
            batch = slice(start, min(start + batch_size, num_samples))
            yield batch
            bar.update(batch.stop - batch.start)


def _queries(pictures: Sequence[Path], prompts: Sequence[str]) -> list[Query]:
    from data_pipeline.images import open_picture
    from eval.predictor import Query, Turn

    return [
        Query((open_picture(picture),), (Turn("user", prompt),))
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]
