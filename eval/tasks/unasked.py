"""Questions that cannot be asked, such as one that is longer than the model reads: named, counted, an empty answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.tasks.result import Answerer, Task
from models.common.errors import InputError

UNASKED = "unasked"
"""The key of the reason where an answer would stand."""


def ask_places(task: Task, predictor: Answerer, batch_size: int, places: range) -> list[Any]:
    """The answers; where a batch has a question that cannot be asked, each is asked alone and that one is named.

    Raises:
        InputError: of a task whose outputs are no texts.
    """
    try:
        return task.ask(predictor, batch_size, places, progress=False)
    except InputError as error:
        if not task.scores_texts:
            raise
        if len(places) == 1:
            return [{UNASKED: str(error)}]
        return [answer for place in places for answer in ask_places(task, predictor, 1, range(place, place + 1))]


def reasons_in(task: Task, answered: Sequence[Any]) -> dict[int, str]:
    """Why questions were not asked, by their places.

    Raises:
        InputError: none was asked.
    """
    found = {
        place: str(answer[UNASKED])
        for place, answer in enumerate(answered)
        if isinstance(answer, Mapping) and UNASKED in answer
    }
    if found and len(found) == task.num_samples:
        raise InputError(f"{task.name}: question {min(found) + 1} cannot be asked: {found[min(found)]}")
    return found


def without(reasons: Mapping[int, str], answered: Sequence[Any]) -> list[Any]:
    """The answers with empty ones where nothing was asked."""
    return ["" if place in reasons else answer for place, answer in enumerate(answered)]
