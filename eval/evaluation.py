"""Measuring several tasks on one model: asking what is missing, then scoring.

    answers of earlier starts ──┐
    this worker's batches ──────┴─▶ parts on disk ──all there──▶ scores, samples, OUT.json

Owns the order of these. The worker that finds everything answered scores; the others end before. Nothing is asked that
an earlier evaluation in OUT.json has asked alike: then only the scores are computed again, and no model is opened.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.kept_answers import KeptAnswers, asked_id
from eval.results import read_samples, write_facts, write_results, write_samples
from eval.tasks.unasked import UNASKED, ask_places, reasons_in, without
from eval.workers import Worker
from models.common.documents import parse, read_value
from models.common.errors import InputError
from models.common.source import sha256_of

if TYPE_CHECKING:
    from eval.tasks.result import Answerer, Task

_NUM_NAMED = 20


class Opened:
    """A model that is opened when it is first asked; `facts` says then what moves numbers beside the protocol."""

    def __init__(self, open_model: Callable[[], Answerer], facts: Callable[[Answerer], dict[str, Any]]) -> None:
        self._open, self._facts = open_model, facts
        self._model: Answerer | None = None

    @property
    def model(self) -> Answerer:
        """The model, opened now if it was not."""
        if self._model is None:
            self._model = self._open()
        return self._model

    def facts(self, batch_size: int) -> dict[str, Any]:
        """Batch size, and what `facts` found."""
        return {"batch_size": batch_size, **self._facts(self.model)}


def evaluate(
    opened: Opened,
    tasks: Sequence[Task],
    out: Path,
    *,
    model: str,
    batch_size: int,
    worker: Worker | None = None,
) -> dict[str, Any] | None:
    """Ask this worker's share of every task; score and write all where nothing is missing any more.

    Returns:
        What OUT.json holds; None where other workers are still asking.
    """
    started_s = time.perf_counter()
    worker = worker or Worker()
    ids = [asked_id(task.asked(), Path(model)) for task in tasks]
    kept = [
        KeptAnswers(out, task.name, asked, task.num_samples, worker) for task, asked in zip(tasks, ids, strict=True)
    ]
    earlier = [_earlier(out, task, asked) for task, asked in zip(tasks, ids, strict=True)]
    for task, answers, old in zip(tasks, kept, earlier, strict=True):
        if old is None:
            ask_share(task, opened, answers, batch_size)
    found = [old or answers.all() for answers, old in zip(kept, earlier, strict=True)]
    results = []
    for task, asked, answered in zip(tasks, ids, found, strict=True):
        if answered is None:
            return None
        results.append(_scored(task, asked, answered, out))
    evaluation: dict[str, Any] = {"model": model, "results": results}
    facts = [each for answers in kept for each in answers.all_facts()]
    write_results(out, evaluation)
    if facts:
        unique = [parse(text, out) for text in dict.fromkeys(json.dumps(each, sort_keys=True) for each in facts)]
        write_facts(out, {"asked_by": unique, "seconds": round(time.perf_counter() - started_s, 3)})
    for answers in kept:
        answers.remove()
    return evaluation


def ask_share(task: Task, opened: Opened, kept: KeptAnswers, batch_size: int) -> None:
    """Ask this worker's batches that have no answer yet; each is on the disk before the next is asked."""
    from tqdm import tqdm

    batches = list(kept.missing(batch_size))
    if not batches:
        return
    print(f"{task.name}: {kept.count()} of {task.num_samples} answers are there", flush=True)
    predictor = opened.model
    kept.facts = opened.facts(batch_size)
    with tqdm(total=sum(map(len, batches)), desc=task.name, unit="sample") as bar:
        for places in batches:
            kept.add(places, ask_places(task, predictor, batch_size, places))
            bar.update(len(places))


def _scored(task: Task, asked: str, answered: Sequence[Any], out: Path) -> dict[str, Any]:
    """A task's result as OUT.json has it, with its samples written; what was not asked counts as an empty answer."""
    reasons = reasons_in(task, answered)
    result = task.score(without(reasons, answered))
    samples = [
        {**sample, UNASKED: reasons[place]} if place in reasons else sample
        for place, sample in enumerate(result.samples)
    ]
    path = write_samples(out, task.name, samples)
    found = {
        **result.as_dict(),
        "asked": asked,
        "samples": path.name,
        "samples_digest": sha256_of(path),
        "config": task.config.model_dump(mode="json"),
    }
    if reasons:
        names = [{"place": place, "reason": reason} for place, reason in list(reasons.items())[:_NUM_NAMED]]
        found |= {"num_unasked": len(reasons), UNASKED: names}
    return found


def _earlier(out: Path, task: Task, asked: str) -> list[Any] | None:
    """The answers of an evaluation that is finished, where it asked the very same."""
    try:
        results = read_value(out)["results"]
        (result,) = [each for each in results if each["name"] == task.name and each.get("asked") == asked]
        path = out.with_name(result["samples"])
        if sha256_of(path) != result["samples_digest"]:
            return None
        samples = read_samples(path)
        answers = task.answers_in(samples)
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return None
    marked = [
        {UNASKED: sample[UNASKED]} if UNASKED in sample else answer
        for sample, answer in zip(samples, answers, strict=True)
    ]
    return marked if len(marked) == task.num_samples else None
