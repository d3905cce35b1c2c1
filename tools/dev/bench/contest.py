"""One cell of the accelerator's table: both ways over the same frozen weights and the same samples, in turns.

    peer's block, ours, ours, peer's    each a whole number of steps, until its time is up

Owns blocks and their memory; `room` chooses our rows per micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from data_pipeline.feed import feed
from models.common.errors import InputError
from tools.dev.bench.measure import compare
from tools.dev.bench.pair import (
    PeerStep,
    build_our_step,
    build_ours,
    build_peer,
    packed_rows,
    padded_batches,
)
from tools.dev.bench.room import ROW_TOKENS, Cell, choices
from trainer.config.schema import EngineConfig
from trainer.engine.train_step import configure_model

PEER_ROWS = 16
"""At first; halved until they fit."""


@dataclass(frozen=True)
class Found:
    """Samples a second; bytes at the peak, 0 where the device does not count them."""

    ours: float
    peer: float
    ratio: float
    our_bytes: int
    peer_bytes: int
    expected_bytes: float
    device: str


@dataclass
class Way:
    """One way's step, its optimizer and its blocks' results."""

    step: nn.Module
    batches: Callable[[], Iterable[Batch]]
    cell: Cell
    peak_bytes: int = 0
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        learning = [parameter for parameter in self.step.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=self.cell.device.type == "cuda" or None)

    def has_room(self) -> bool:
        """Take one step; False if the device's memory did not suffice, after freeing it."""
        try:
            self.update()
        except torch.cuda.OutOfMemoryError:
            pass
        else:
            return True
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return False

    def update(self) -> None:
        """Take one optimizer step over all samples of the cell."""
        targets = sum(sample.num_targets for sample in self.cell.samples)
        for batch in self.batches():
            sums = self.step(batch)
            loss: Tensor = sums if isinstance(sums, Tensor) else sums.loss_sum
            (loss / targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def block(self, seconds: float) -> float:
        """Samples per second over whole steps, as many as begin within `seconds`."""
        is_cuda, device, num_steps = self.cell.device.type == "cuda", self.cell.device, 0
        if is_cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        started_s = time.perf_counter()
        while not num_steps or time.perf_counter() - started_s < seconds:
            self.update()
            if is_cuda:
                torch.cuda.synchronize(device)
            num_steps += 1
        took_s = time.perf_counter() - started_s
        if is_cuda:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(device))
        return num_steps * len(self.cell.samples) / took_s

    @property
    def own_bytes(self) -> int:
        """Bytes of trained weights and moments, allocated all the time, also while the other way runs."""
        learning = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*learning, *moments])


def ceiling(device: torch.device, side: int) -> float:
    """FLOP/s of a bf16 matrix product of random numbers; the best of five."""
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best_s = float("inf")
    for _ in range(8 if device.type == "cuda" else 2):
        started_s = time.perf_counter()
        for _ in range(10 if device.type == "cuda" else 1):
            torch.mm(one, other)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, (time.perf_counter() - started_s) / (10 if device.type == "cuda" else 1))
    return 2 * side**3 / best_s


def contest(cell: Cell, *, seconds: float, profiles: bool) -> Found:
    """Both ways in turns over the same frozen weights, within about `seconds`."""
    began_s = time.monotonic()
    torch.manual_seed(0)
    peer = build_peer(cell.shape, torch.bfloat16, cell.device)
    model = build_ours(peer, cell.shape)
    fitting = choices(cell, model)
    theirs = _peer(cell, peer, model)
    ours, expected = _ours(cell, model, fitting)
    left_s = max(0.0, seconds - (time.monotonic() - began_s))
    block_s = 0.8 * left_s / 6  # each way a block to warm up and two that count; steps are whole, so blocks run over
    line = compare("", "", lambda: ours.block(block_s), lambda: theirs.block(block_s), rounds=1, packages=[])
    if profiles:
        print(where_time_goes(ours), flush=True)
    return Found(
        ours=line.ours,
        peer=line.peer,
        ratio=line.ratio,
        our_bytes=max(0, ours.peak_bytes - theirs.own_bytes),
        peer_bytes=max(0, theirs.peak_bytes - ours.own_bytes),
        expected_bytes=expected,
        device=torch.cuda.get_device_name(cell.device) if cell.device.type == "cuda" else line.device,
    )


def _ours(cell: Cell, model: Any, fitting: Iterable[tuple[int, int, float]]) -> tuple[Way, float]:
    """Our way with the first choice that fits the device, and preflight's estimate of its bytes."""
    step = build_our_step(model, cell.tuned, precision="bf16", rank=cell.rank)
    configure_model(model, EngineConfig(precision="bf16", compile=cell.compiles))
    for rows, num_recomputed, expected in fitting:
        model.decoder.recompute(num_recomputed)
        parts = packed_rows(cell.samples, ROW_TOKENS, rows)
        way = Way(step, lambda parts=parts: feed(parts, cell.shape.text, cell.device), cell)  # type: ignore[misc]
        if way.has_room():  # kernels are chosen, layers compiled
            return way, expected
    raise InputError(f"one row of {ROW_TOKENS} tokens does not fit on {cell.device}, with every layer computed again")


def _peer(cell: Cell, peer: Any, model: Any) -> Way:
    """The peer with as many rows per micro-batch as fit, found by halving."""
    step = PeerStep(peer, model, cell.tuned, precision="bf16", recompute=True, rank=cell.rank)
    rows = PEER_ROWS
    while rows:
        batches = padded_batches(cell.samples, cell.shape, rows)
        if cell.device.type == "cuda":
            batches = [batch.pin_memory() for batch in batches]
        way = Way(step, lambda given=batches: (b.to(cell.device, non_blocking=True) for b in given), cell)  # type: ignore[misc]
        if way.has_room():
            return way
        rows //= 2
    raise InputError(f"one padded row of the peer does not fit on {cell.device}")


def where_time_goes(way: Way) -> str:
    """A table of the kernels of one step, the most expensive first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if way.cell.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        way.update()
        if way.cell.device.type == "cuda":
            torch.cuda.synchronize(way.cell.device)
    by = "self_cuda_time_total" if way.cell.device.type == "cuda" else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60)
