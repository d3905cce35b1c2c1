"""Which sample, and which module, first gave a number that is not finite.

Owns the search alone: rows are run one sample at a time with every module watched. All ranks take part, since under
ZeRO-3 a forward is a collective; a rank with fewer suspects runs empty rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, collate
from data_pipeline.sample import Row
from models.spec import TextSpec
from trainer.engine import Engine
from trainer.ranks import Ranks


@dataclass(frozen=True)
class Culprit:
    """A sample whose numbers are not finite, and the first module whose output (or whose gradient) was not."""

    rank: int
    slot: int
    n: int
    shard: str
    key: str
    phase: Literal["forward", "backward"]
    module: str


def find_culprits(
    engine: Engine,
    suspects: Sequence[Row],
    *,
    phase: Literal["forward", "backward"],
    text: TextSpec,
    device: torch.device,
    ranks: Ranks,
) -> list[Culprit]:
    """The culprits among every rank's suspects, in rank order, the same list on every rank.

    In the backward phase gradients are added up and thrown away: call it between two steps only.
    """
    samples = [sample for row in suspects for sample in row]
    num_rounds = max(1, *ranks.gather(len(samples)))
    found: list[Culprit] = []
    for place in range(num_rounds):
        sample = samples[place] if place < len(samples) else None
        batch = collate([(sample,) if sample is not None else ()], text).to(device)
        module = _run(engine, batch, phase, is_last=place + 1 == num_rounds)
        if sample is not None and module is not None:
            draw = sample.draw
            found.append(Culprit(ranks.rank, draw.slot, draw.n, sample.shard, sample.key, phase, module))
    if phase == "backward":
        engine.discard()
    return [culprit for share in ranks.gather(found) for culprit in share]


def _run(engine: Engine, batch: Batch, phase: str, *, is_last: bool) -> str | None:
    """Run one sample; the first module that was not finite, or None."""
    with _watched(engine.module, backward=phase == "backward") as seen:
        if phase == "backward":
            engine.backward(engine.forward(batch, is_last=is_last).loss_sum, 1.0)
        elif not bool(torch.isfinite(engine.evaluate(batch).loss_sum)):
            seen.append("the loss")
    return seen[0] if seen else None


@contextmanager
def _watched(module: nn.Module, *, backward: bool) -> Iterator[list[str]]:
    """Hooks that note, in order, modules whose outputs are not finite, or whose outputs' gradients are not."""
    seen: list[str] = []

    def note(name: str, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            seen.append(name)

    def hook(name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            for value in _tensors(output):
                if not backward:
                    note(name, value)
                elif value.requires_grad:
                    value.register_hook(lambda gradient: note(name, gradient))

        return look

    handles = [part.register_forward_hook(hook(name or "the loss")) for name, part in module.named_modules()]
    if backward:
        handles += [
            parameter.register_hook(lambda gradient, name=name: note(name, gradient))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in whatever a module returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
