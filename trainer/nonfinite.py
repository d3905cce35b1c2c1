"""Finds the sample and the module that first gave a non-finite value, and quarantines the sample.

    suspects of all ranks --one sample at a time, every module watched--> NonFiniteSample --> quarantine, events, log
                                                                              '--> never drawn again

All ranks take part in the search, since under ZeRO-3 a forward is a collective; a rank with fewer suspects runs empty
rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, collate
from data_pipeline.sample import Row
from data_pipeline.stream import RowStream
from models.common.files import LineFile
from models.spec import TextSpec
from trainer.distributed.context import DistributedContext
from trainer.objectives.loss_sum import LossSum

logger = logging.getLogger(__name__)


class TracedEngine(Protocol):
    """The part of the engine that the search needs."""

    @property
    def module(self) -> nn.Module:
        """Model and objective, whose modules are watched."""

    def forward(self, batch: Batch, *, is_last: bool) -> LossSum:
        """The sums of one micro-batch."""

    def backward(self, loss_sum: Tensor, num_targets: float, scale: float = 1.0) -> None:
        """Add the gradient of loss_sum / num_targets."""

    def evaluate(self, batch: Batch) -> LossSum:
        """The sums of one micro-batch without a gradient."""

    def discard(self) -> None:
        """Drop the gradient."""


@dataclass(frozen=True)
class NonFiniteSample:
    """A sample with non-finite values, and the first module whose output (or gradient) was not finite."""

    rank: int
    slot: int
    n: int
    shard: str
    key: str
    phase: str
    """forward or backward."""
    module: str


class NonFiniteTracer:
    """Finds the samples that cause non-finite values, quarantines them, and excludes them."""

    def __init__(
        self,
        engine: TracedEngine,
        stream: RowStream,
        *,
        events: LineFile,
        text: TextSpec,
        device: torch.device,
        ranks: DistributedContext,
    ) -> None:
        self._engine, self._stream, self._events = engine, stream, events
        self._text, self._device, self._ranks = text, device, ranks

    def report(self, suspects: list[Row], phase: str, consequence: str, batch: int) -> None:
        """Find the samples that caused it among every rank's suspects of global batch `batch`, and log the result.

        Every rank must call it at the same place. In the backward phase gradients are added up and discarded: between
        two steps only.
        """
        found = self._trace(suspects, phase)
        self._stream.exclude((sample.shard, sample.key) for sample in found)
        if not self._ranks.is_first:
            return
        if not found:
            logger.info(f"batch {batch}: not finite, but no sample is so by itself; {consequence}")
        for sample in found:
            where = "output" if sample.phase == "forward" else "gradient"
            reason = f"not finite in batch {batch}: the {where} of {sample.module}"
            logger.info(f"rank {sample.rank}: {sample.shard} {sample.key}: {reason}; {consequence}")
            entry = asdict(sample)
            self._events.write({"event": "not finite", "batch": batch, **entry})
            address = {name: entry[name] for name in ("slot", "n", "shard", "key")}
            self._stream.note({"kind": "not_finite", "reason": reason, **address})

    def _trace(self, suspects: Sequence[Row], phase: str) -> list[NonFiniteSample]:
        """The samples that caused it, in rank order, the same list on every rank."""
        samples = [sample for row in suspects for sample in row]
        num_rounds = max(1, *self._ranks.gather(len(samples)))
        found: list[NonFiniteSample] = []
        for place in range(num_rounds):
            sample = samples[place] if place < len(samples) else None
            batch = collate([(sample,) if sample is not None else ()], self._text).to(self._device)
            module = _run(self._engine, batch, phase, is_last=place + 1 == num_rounds)
            if sample is not None and module is not None:
                ref = sample.ref
                found.append(NonFiniteSample(self._ranks.rank, ref.slot, ref.n, ref.shard, ref.key, phase, module))
        if phase == "backward":
            self._engine.discard()
        return [sample for share in self._ranks.gather(found) for sample in share]


def _run(engine: TracedEngine, batch: Batch, phase: str, *, is_last: bool) -> str | None:
    """Run one sample; returns the first module with a non-finite value, or None."""
    with _watched(engine.module, backward=phase == "backward") as seen:
        if phase == "backward":
            engine.backward(engine.forward(batch, is_last=is_last).loss_sum, 1.0)
        elif not bool(torch.isfinite(engine.evaluate(batch).loss_sum)):
            seen.append("the loss")
    return seen[0] if seen else None


@contextmanager
def _watched(module: nn.Module, *, backward: bool) -> Iterator[list[str]]:
    """Hooks that record, in order, modules whose outputs (or whose outputs' gradients) are not finite."""
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
