"""Rows -> micro-batches on the device, the next one collated and copied while the current one computes.

Owns when a copy begins and when it is waited for. Does not own what is in a batch (`batch`).

    host:    collate 1, pin | collate 2, pin | launch 1 | collate 3, pin | launch 2 | ...
    copies:           copy 1            copy 2                     copy 3
    device:                                       compute 1               compute 2
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from data_pipeline.batch import Batch, collate
from data_pipeline.sample import Row
from models.spec import TextSpec


def feed(parts: Iterable[Sequence[Row]], text: TextSpec, device: torch.device) -> Iterator[Batch]:
    """The micro-batches of `parts`, on `device`; at most one beyond those that the caller has taken is started.

    On a GPU the copies run on a stream of their own, from page-locked memory; elsewhere they are plain.
    """
    batches = (collate(rows, text) for rows in parts)
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copies = torch.cuda.Stream(device)
    waiting: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        begun = _begin_copy(batch, device, copies)
        if waiting is not None:
            yield _end_copy(*waiting)
        waiting = begun
    if waiting is not None:
        yield _end_copy(*waiting)


def _begin_copy(batch: Batch, device: torch.device, copies: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
    """Start a copy that overlaps with the computation. PyTorch keeps the page-locked memory until the copy is done."""
    with torch.cuda.stream(copies):
        moved = batch.pin_memory().to(device, non_blocking=True)
        return moved, copies.record_event()


def _end_copy(batch: Batch, done: torch.cuda.Event) -> Batch:
    """Make the computation wait for this copy alone; its memory is not reused while the computation reads it."""
    present = torch.cuda.current_stream(batch.device)
    present.wait_event(done)
    for tensor in batch.tensors():
        tensor.record_stream(present)
    return batch
