"""Merging ZeRO shards against DeepSpeed's own zero_to_fp32: `make bench-merge`. Seconds, and peak memory.

    drawn checkpoint of two ranks --python -m tools.merge-----------------> model directory, fp32
                                  --python -m deepspeed.utils.zero_to_fp32-> model directory, fp32   (bit for bit equal)

Each way runs as its command, in a separate process, start and imports included; the memory
is that process's largest resident set as the system counts it, mapped pages included. The shape is Llama's, 0.86
billion parameters: 3.4 GB in fp32. Adam's moments are left out of the files, since neither way reads them. The files
take 12 GB under `--folder` and are removed at the end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.errors import InputError, run_cli
from models.common.files import sync

if TYPE_CHECKING:
    from tools.dev.bench.measure import Row

WORLD_SIZE = 2
WIDTH, INNER, VOCABULARY = 2048, 5632, 32_000
STAGES = (2, 3)


@dataclass(frozen=True)
class Spent:
    """One command's cost: `seconds` until its files are on the disk, `command_s` until it returned."""

    seconds: float
    command_s: float
    cpu_seconds: float
    peak_bytes: int


def main(argv: list[str]) -> int:
    """Draw, run both, compare their files and print the table."""
    parser = argparse.ArgumentParser(prog="tools.bench.merge", description="Merge ZeRO shards, ours against DeepSpeed.")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/merge"), help="where the files lie meanwhile")
    parser.add_argument("--layers", type=int, default=14, help="of the language model; 14 make 3.4 GB in fp32")
    parser.add_argument("--rounds", type=int, default=1, help="each runs both ways twice, in turns")
    arguments = parser.parse_args(argv)
    if arguments.layers < 1 or arguments.rounds < 1:
        raise InputError("--layers and --rounds: at least 1 is needed")
    from tools.dev.bench.measure import report

    rows: list[Row] = []
    for stage in STAGES:
        rows += measure(stage, arguments.layers, arguments.rounds, arguments.folder)
    report("merge", rows)
    return 0


def measure(stage: int, num_layers: int, rounds: int, folder: Path) -> list[Row]:
    """Seconds, CPU seconds and peak memory of both ways on a checkpoint of `stage`; their files must be equal."""
    from tools.dev.bench.measure import row

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, ours, peer = folder / "checkpoint", folder / "ours", folder / "peer"
    commands = {
        ours: [sys.executable, "-m", "tools.merge", str(checkpoint), str(ours)],
        peer: [
            sys.executable,
            "-m",
            "deepspeed.utils.zero_to_fp32",
            str(checkpoint),
            str(peer),
            "--safe_serialization",
        ],
    }
    spent: dict[Path, list[Spent]] = {ours: [], peer: []}
    try:
        apart(draw, checkpoint, shapes_of(num_layers), stage)
        for out in [peer, ours, ours, peer] * rounds:
            shutil.rmtree(out, ignore_errors=True)
            os.sync()  # pending writes of the previous command must not count for this one
            spent[out].append(run(commands[out], out))
            print(f"ZeRO-{stage} {out.name}: {spent[out][-1]}", flush=True)
        apart(check_equal, ours, peer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = []
    for what, unit, amount in (
        ("seconds until on the disk", "s", lambda each: each.seconds),
        ("seconds of the command", "s", lambda each: each.command_s),
        ("CPU seconds", "s", lambda each: each.cpu_seconds),
        ("peak memory", "MB", lambda each: each.peak_bytes / 1e6),
    ):
        one, other = (statistics.median(map(amount, spent[out])) for out in (ours, peer))
        found.append(row(f"ZeRO-{stage}, {what}", unit, one, other, ["deepspeed", "torch"], ratio=other / one))
    return found


def apart(work: Callable[..., None], *arguments: Any) -> None:
    """Run in a separate process: a child's peak memory includes its parent's memory at the start."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0, f"{work.__name__} failed, see above"


def run(command: list[str], out: Path) -> Spent:
    """Run a command to its end, and until its files are on the disk; raises InputError if it fails."""
    started_s = time.perf_counter()
    process = os.posix_spawn(command[0], command, {**os.environ, "DS_ACCELERATOR": "cpu"})
    _, status, usage = os.wait4(process, 0)
    if status != 0:
        raise InputError(f"{' '.join(command[1:4])}: failed, see above; is there room for 12 GB?")
    command_s = time.perf_counter() - started_s
    for file in out.iterdir():
        sync(file)
    seconds = time.perf_counter() - started_s
    return Spent(seconds, command_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def shapes_of(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama of this width."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for number in range(num_layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{side}_proj.weight": (WIDTH, WIDTH) for side in "qkvo"}
        shapes |= {f"{layer}.mlp.{side}_proj.weight": (INNER, WIDTH) for side in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes |= {f"{layer}.{side}_layernorm.weight": (WIDTH,) for side in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def draw(checkpoint: Path, shapes: dict[str, tuple[int, ...]], stage: int) -> None:
    """Write the files that DeepSpeed writes for this stage and two ranks, with drawn weights."""
    import math

    import torch

    tag = checkpoint / "global_step1"
    shutil.rmtree(checkpoint, ignore_errors=True)
    tag.mkdir(parents=True)
    (checkpoint / "latest").write_text("global_step1")
    total = sum(math.prod(shape) for shape in shapes.values())
    if stage == 3:
        size = sum(math.ceil(math.prod(shape) / WORLD_SIZE) for shape in shapes.values())
    else:
        size = math.ceil(total / (2 * WORLD_SIZE)) * 2
    generator = torch.Generator().manual_seed(0)
    for rank in range(WORLD_SIZE):
        flat = torch.empty(size).uniform_(-0.05, 0.05, generator=generator)
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        state = {"zero_stage": stage, "partition_count": WORLD_SIZE, key: [flat]}
        torch.save({"optimizer_state_dict": state}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    held = {  # the half-precision copy that a checkpoint also has; ZeRO-3 leaves empty tensors
        name: torch.empty(0 if stage == 3 else shape, dtype=torch.bfloat16) for name, shape in shapes.items()
    }
    model = {
        "module": held,
        "buffer_names": [],
        "param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}],
        "shared_params": {},
        "ds_version": "0.19.8",
    }
    for rank in range(WORLD_SIZE if stage == 3 else 1):
        prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        torch.save(model, tag / f"{prefix}mp_rank_00_model_states.pt")


def check_equal(ours: Path, peer: Path) -> None:
    """Both directories hold the same tensors, bit for bit; AssertionError naming one that differs."""
    import torch

    from models.common.sharded import TensorFiles

    one, other = TensorFiles.open(ours), TensorFiles.open(peer)
    assert set(one) == set(other), "other names"
    for name in one:
        assert torch.equal(one.read(name), other.read(name)), name


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
