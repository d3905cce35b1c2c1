"""The interface of a task: what it needs of a model, and its result.

Owns: the `Task` and `Answerer` contracts, and asking a model batch by batch. Does not own what a task measures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from eval.images import Shown, StoredImage
from eval.result import TaskResult
from models.spec import Config

if TYPE_CHECKING:
    from eval.predictor import Decoding, Query


class Answerer(Protocol):
    """What a task needs of an `eval.predictor.Predictor`."""

    def answer(self, queries: Sequence[Query], decoding: Decoding) -> list[str]:
        """Decode one answer to each query, in their order."""

    def loss(self, queries: Sequence[Query], answers: Sequence[str]) -> list[tuple[float, int]]:
        """Of each answer: summed negative log-likelihood in nats, number of tokens."""


class Task(Protocol):
    """A benchmark whose files are read and checked; `run` needs only a model."""

    name: str
    metric_names: tuple[str, ...]
    """Names of the metrics in its result."""

    @property
    def config(self) -> Config:
        """The task's entry in a suite, which goes into the results."""

    @property
    def num_samples(self) -> int:
        """How many samples it asks about."""

    scores_texts: bool
    """Whether `score` takes texts, of which an empty one stands for a question that could not be asked."""
    compares_vectors: bool
    """Whether `ask` needs an encoder of images and texts instead of a model that answers."""

    def asked(self) -> dict[str, Any]:
        """What is asked, as a JSON object: digests of all prompts and pictures in their order, and the decoding."""

    def answers_in(self, samples: Sequence[Mapping[str, Any]]) -> list[Any]:
        """`ask`'s outputs as `score`'s samples have them; raises KeyError where they do not."""

    def ask(self, predictor: Answerer, batch_size: int, places: range, *, progress: bool = True) -> list[Any]:
        """The model's outputs for the samples at `places` (a rank's share), one small picklable value each."""

    def score(self, answers: Sequence[Any]) -> TaskResult:
        """The result, from `ask`'s outputs for all samples in their order; needs no model."""

    def run(self, predictor: Answerer, batch_size: int) -> TaskResult:
        """Ask about every sample, then score; shows progress."""


def digest_of(values: Iterable[Any]) -> str:
    """The sha256 of JSON values in their order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def greedy(max_new_tokens: int) -> Decoding:
    """Greedy decoding with the default settings, of at most `max_new_tokens`."""
    from eval.predictor import Decoding

    return Decoding(max_new_tokens=max_new_tokens)


def decoding_facts(max_new_tokens: int) -> dict[str, Any]:
    """The settings of `greedy` that are part of a protocol's hash."""
    return {"max_new_tokens": max_new_tokens, "temperature": 0.0, "num_beams": 1}


def answer_all(
    predictor: Answerer,
    images: Sequence[Shown],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str | None,
) -> list[str]:
    """Greedy answers, one to each (image, prompt). Progress is shown under `label`; None shows none."""
    decoding = greedy(max_new_tokens)
    answers: list[str] = []
    for batch in _batches(len(prompts), batch_size, label):
        answers += predictor.answer(_queries(images[batch], prompts[batch]), decoding)
    return answers


def loss_all(
    predictor: Answerer,
    images: Sequence[Shown],
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int,
    label: str | None,
) -> list[tuple[float, int]]:
    """Summed loss in nats and number of tokens of each answer, given its image and prompt."""
    losses: list[tuple[float, int]] = []
    for batch in _batches(len(prompts), batch_size, label):
        losses += predictor.loss(_queries(images[batch], prompts[batch]), answers[batch])
    return losses


def _batches(num_samples: int, batch_size: int, label: str | None) -> Iterator[slice]:
    from tqdm import tqdm

    with tqdm(total=num_samples, desc=label, unit="sample", disable=label is None) as bar:
        for start in range(0, num_samples, batch_size):
            batch = slice(start, min(start + batch_size, num_samples))
            yield batch
            bar.update(batch.stop - batch.start)


def _queries(images: Sequence[Shown], prompts: Sequence[str]) -> list[Query]:
    from data_pipeline.images import open_image
    from eval.predictor import Query, Turn

    shown = [() if image is None else (open_image(_source(image)),) for image in images]
    return [Query(opened, (Turn("user", prompt),)) for opened, prompt in zip(shown, prompts, strict=True)]


def _source(image: Path | StoredImage) -> Path | bytes:
    return image if isinstance(image, Path) else image.read()
