"""Saving during training against DeepSpeed's save_checkpoint: `make bench-checkpoint`. Seconds that the loop is
blocked, and bytes written.

    one engine (ZeRO-2, one rank), a frozen part of 1.07 GB, a trained part with Adam's moments
        ours                     the loop is blocked for a copy; a thread writes, hashes and fsyncs; a commit
        save_checkpoint          DeepSpeed's, as it is called by default: the loop is blocked until everything is
        written ... without frozen       DeepSpeed's with exclude_frozen_parameters=True

All save the same state at the same step, in turns. Only ours is on the disk (fsync) when it reports success, with a
sha256 of each file. `held` is the time that training loses, `until it is safe` the time until ours is committed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.errors import InputError, run_cli

if TYPE_CHECKING:
    from tools.dev.bench.measure import Row
    from trainer.checkpoint.manager import CheckpointManager
    from trainer.engine.engine import Engine

WIDTH = 4096
PACKAGES = ["torch", "deepspeed", "safetensors"]


def main(argv: list[str]) -> int:
    """Measure, print the table and write runs/bench/checkpoint.json."""
    parser = argparse.ArgumentParser(prog="tools.bench.checkpoint", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/checkpoint"), help="where files lie meanwhile")
    parser.add_argument("--frozen", type=int, default=16, help="matrices of 67 MB that do not learn; 16 make 1.07 GB")
    parser.add_argument(
        "--trained", type=int, default=20, help="millions of weights that learn (a LoRA of a 7B: 20 up)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    if min(arguments.frozen, arguments.trained, arguments.rounds) < 1:
        raise InputError("--frozen, --trained and --rounds: at least 1 is needed")

    from tools.dev.bench.measure import report, row
    from trainer.engine.process_group import leave_distributed

    engine = make_engine(arguments.frozen, arguments.trained * 1_000_000)
    rows: list[Row] = []
    try:
        ours, whole, trained = measure(engine, arguments.folder, arguments.rounds)
    finally:
        engine.close()
        leave_distributed()
        shutil.rmtree(arguments.folder, ignore_errors=True)
    for name, peer in (("save_checkpoint", whole), ("save_checkpoint without frozen", trained)):
        rows += [
            row(f"{name}: loop held", "s (less is better)", ours[0], peer[0], PACKAGES, ratio=peer[0] / ours[0]),
            row(f"{name}: until it is safe", "s (less is better)", ours[1], peer[1], PACKAGES, ratio=peer[1] / ours[1]),
            row(f"{name}: written", "GB (less is better)", ours[2], peer[2], PACKAGES, ratio=peer[2] / ours[2]),
        ]
    report("checkpoint", rows)
    return 0


def make_engine(num_frozen: int, num_trained: int) -> Engine:
    """An engine that has taken one step, so that Adam has its moments."""
    import torch
    from torch import nn

    from trainer.config.schema import AdamW, EngineConfig
    from trainer.distributed.context import from_environment
    from trainer.engine.engine import build_engine
    from trainer.engine.process_group import start_distributed
    from trainer.engine.tuning import ParameterGroup
    from trainer.objectives.loss_sum import LossSum

    class Model(nn.Module):
        """Frozen matrices one after another, and a trained one at the end."""

        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_frozen))
            self.frozen.requires_grad_(False)
            self.trained = nn.Linear(WIDTH, max(1, num_trained // WIDTH), bias=False)

        def forward(self, batch: Any) -> LossSum:
            for layer in self.frozen:
                batch = layer(batch)
            losses_B = self.trained(batch).square().sum(-1)
            return LossSum(losses_B.sum(), torch.zeros(()), losses_B.detach())

    ranks = from_environment()
    start_distributed(ranks, 600.0)
    model: Any = Model()
    groups = [ParameterGroup("trained", ("trained.weight",), (model.trained.weight,), 1e-3, 0.0)]
    engine = build_engine(
        model,
        groups,
        config=EngineConfig(zero="zero2", precision="fp32"),
        optimizer=AdamW(),
        micro_rows=1,
        num_micro_batches=1,
        ranks=ranks,
    )
    batch: Any = torch.randn(1, WIDTH)
    engine.backward(engine.forward(batch, is_last=True).loss_sum, 1.0)
    engine.step(1.0, sum(engine.squared_norms()) ** 0.5)
    return engine


def measure(engine: Engine, folder: Path, rounds: int) -> list[tuple[float, float, float]]:
    """Medians of (seconds blocked, seconds until the save is complete, GB) of the three ways, in turns."""
    from trainer.checkpoint.manager import CheckpointManager
    from trainer.distributed.context import DistributedContext

    peer: Any = engine._engine  # what is measured is DeepSpeed's own method
    saver = CheckpointManager(folder, DistributedContext(), keep=1, token="bench")
    ways: list[Callable[[Path], tuple[float, float]]] = [
        lambda _: _ours(engine, saver),
        lambda place: _theirs(lambda: peer.save_checkpoint(str(place))),
        lambda place: _theirs(lambda: peer.save_checkpoint(str(place), exclude_frozen_parameters=True)),
    ]
    found: list[list[tuple[float, float, float]]] = [[], [], []]
    for number in range(rounds):
        order = range(3) if number % 2 == 0 else reversed(range(3))
        for way in order:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            blocked_s, safe_s = ways[way](folder)
            num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            found[way].append((blocked_s, safe_s, num_bytes / 1e9))
    medians = [[statistics.median(column) for column in zip(*each, strict=True)] for each in found]
    return [(held, safe, size) for held, safe, size in medians]


def _ours(engine: Engine, saver: CheckpointManager) -> tuple[float, float]:
    held_before_s, started_s = saver.blocked_s, time.monotonic()
    saver.begin(1, fragments=engine.fragments(), inherited=[], state={})
    while not saver.is_written:  # here the loop continues training
        time.sleep(0.005)
    fault = saver.finish()
    if fault:
        raise InputError(fault)
    return saver.blocked_s - held_before_s, time.monotonic() - started_s


def _theirs(save: Callable[[], object]) -> tuple[float, float]:
    started_s = time.monotonic()
    save()
    return (time.monotonic() - started_s,) * 2


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
