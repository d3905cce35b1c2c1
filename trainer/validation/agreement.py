"""Work shared by the ranks that any of them may have to interrupt: then all stop at the same place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eval.live import InterruptedAnswerError
from models.common.errors import InputError
from trainer.distributed.context import DistributedContext

ShouldStop = Callable[[], bool]
"""Whether THIS rank was asked to stop: a flag, no collective. It may differ between ranks; `agree` synchronizes it."""


class Interrupted(Exception):  # noqa: N818 - not an error: a run that was asked to stop
    """A rank was asked to stop; every rank raises this at the same place."""


def agree(ranks: DistributedContext, should_stop: ShouldStop, fault: str) -> None:
    """Raise on every rank if any has a reason: InputError for a `fault`, Interrupted for a stop."""
    stops, faults = ranks.sum([float(should_stop()), float(bool(fault))])
    if faults:
        _raise_first(ranks.gather(fault))
    if stops:
        raise Interrupted


def divided(ranks: DistributedContext, count: int, ask: Callable[[range], list[Any]]) -> list[Any]:
    """`ask` for this rank's part of range(count); the answers of all ranks in order, on every rank.

    Raises on every rank if it raised on any: InputError, or Interrupted for an interrupted answer.
    """
    answers: list[Any] | None = None
    fault = ""
    try:
        answers = ask(ranks.local_rows(count))
    except InterruptedAnswerError:
        pass
    except InputError as error:
        fault = str(error)
    parts = ranks.gather((answers, fault))
    _raise_first([other for _, other in parts])
    if any(part is None for part, _ in parts):
        raise Interrupted
    return [answer for part, _ in parts for answer in part]


def _raise_first(faults: list[str]) -> None:
    for rank, fault in enumerate(faults):
        if fault:
            raise InputError(f"validation, rank {rank}: {fault}")
