"""Counts the places where the host would wait for a device: every look at a tensor's values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config.recipe import Recipe
from trainer.distributed.context import DistributedContext

LOOKS = {
    torch.ops.aten._local_scalar_dense.default,  # item, float, int, bool
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
}


class Waits(TorchDispatchMode):
    """How often values were looked at while it was on, in the forward and the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.num += func in LOOKS or by_mask
        return func(*args, **(kwargs or {}))


@contextmanager
def counting_waits() -> Iterator[Waits]:
    """`tolist` and `numpy` go past the dispatcher and are counted by name."""
    waits = Waits()

    def counted(name: str) -> Any:
        plain = getattr(torch.Tensor, name)

        def look(tensor: torch.Tensor, *given: Any, **options: Any) -> Any:
            waits.num += 1
            return plain(tensor, *given, **options)

        return patch.object(torch.Tensor, name, look)

    with counted("tolist"), counted("numpy"), waits:
        yield waits


def waits_of_a_step(ranks: DistributedContext, recipes: list[dict[str, Any]], stage: str) -> list[tuple[int, int]]:
    """(micro-batches, waits) of each recipe's second optimizer step; the first sets things up."""
    from trainer.build import build_stage
    from trainer.loop import Loop
    from trainer.step import next_batch

    found = []
    for recipe in recipes:
        opened = build_stage(Recipe.model_validate_json(json.dumps(recipe)), stage, ranks)
        try:
            step, state = Loop(opened).step, opened.state
            step.take(next_batch(state.stream, ranks), state.consumed, 1.0)
            batch = next_batch(state.stream, ranks)
            with counting_waits() as waits:
                step.take(batch, state.consumed, 1.0)
            found.append((opened.context.num_micro_batches, waits.num))
        finally:
            opened.close()
    return found
