"""A training step on an accelerator, ours compared with LLaVA's implementation, in turns: `make bench-gpu
PICTURES=DIR`.

    Vicuna-7B + CLIP ViT-L/14-336     stage 1; LoRA of rank 16 and 128
    Qwen2.5-1.5B + CLIP ViT-L/14-336  full
    Qwen2.5-0.5B + CLIP ViT-L/14-336  stage 1; LoRA of rank 16; full

Weights are random, images real, lengths mixed. A step is forward, backward and AdamW's update over the same samples.
The peer is transformers' Llava with padded rows, logits everywhere and every layer recomputed in the backward, as in
LLaVA's scripts. Ours keeps as many activations as preflight's estimate allows. Only needed FLOPs on real tokens count,
relative to the rate of a large matrix product on the same device in the same run.

Needs no network and no DeepSpeed, and ends within --minutes. Owns the cells and their time; `contest` owns one cell,
`pair` the two ways.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.errors import InputError, run_cli

if TYPE_CHECKING:
    import torch

    from tools.dev.bench.contest import Found
    from tools.dev.bench.measure import Row
    from tools.dev.bench.pair import Shape, Tuned
    from tools.dev.bench.room import Cell

PACKAGES = ["torch", "transformers", "peft"]
IMAGE_FILES = ("*.jpg", "*.jpeg", "*.png")
LEAST_S = 20.0
"""A cell is left out where less is left for it."""


@dataclass(frozen=True)
class Plan:
    """One cell of the table: a model's shape, the tuned parts and the adapters."""

    model: str
    tuned: Tuned
    rank: int = 16

    @property
    def title(self) -> str:
        """The cell's name in the table."""
        how = {"projector": "stage 1", "lora": f"LoRA r{self.rank}", "full": "full"}[self.tuned]
        return f"{self.model} {how}"


PLANS = (
    Plan("vicuna7b", "projector"),
    Plan("vicuna7b", "lora", 16),
    Plan("vicuna7b", "lora", 128),
    Plan("qwen15b", "full"),
    Plan("qwen05b", "projector"),
    Plan("qwen05b", "lora", 16),
    Plan("qwen05b", "full"),
)


def main(argv: list[str]) -> int:
    """Run the cells that fit into the minutes, print the table and write runs/bench/gpu.json."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pictures", type=Path, required=True, help="a folder of photos (JPEG or PNG)")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install for this run alone")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--samples", type=int, default=48, help="of mixed lengths, in each step")
    parser.add_argument("--only", nargs="+", default=[], metavar="TITLE", help="begin of a title: 'vicuna7b stage 1'")
    parser.add_argument("--compile", action="store_true", help="compile our decoder layers")
    parser.add_argument("--profile", action="store_true", help="print where our step's time goes")
    parser.add_argument("--tiny", action="store_true", help="the same over a tiny model, on any machine")
    arguments = parser.parse_args(argv)

    ends_s = time.monotonic() + 60 * arguments.minutes
    if arguments.wheels is not None:
        install(arguments.wheels)
    rows = run(arguments, ends_s)
    if not rows:
        raise InputError(f"--minutes {arguments.minutes:g}: not enough for one cell; give more, or fewer --samples")
    from tools.dev.bench.measure import report

    report("gpu", rows)
    return 0


def install(wheels: Path) -> None:
    """Install wheels into a folder for this process only; nothing is downloaded."""
    files = sorted(str(file) for file in wheels.glob("*.whl"))
    if not files:
        raise InputError(f"--wheels {wheels}: no *.whl there")
    folder = tempfile.mkdtemp(prefix="sightline_wheels_")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"--wheels {wheels}: {done.stderr.strip().splitlines()[-1]}")
    sys.path.insert(0, folder)


def run(arguments: argparse.Namespace, ends_s: float) -> list[Row]:
    """Measure as many cells as fit into the time."""
    import torch

    from tools.dev.bench.contest import ceiling

    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device here; `--device cpu --tiny` runs the same code without one")
    plans = [each for each in PLANS if not arguments.only or each.title.startswith(tuple(arguments.only))]
    if not plans:
        raise InputError(f"--only: no title begins so; there are {', '.join(each.title for each in PLANS)}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    peak = ceiling(device, side=512 if arguments.tiny else 8192)
    print(f"{name}: a matrix product reaches {peak / 1e12:.4g} TFLOP/s", flush=True)
    rows: list[Row] = []
    for number, each in enumerate(plans):
        left_s = ends_s - time.monotonic()
        if left_s < LEAST_S and not arguments.tiny:
            print(f"{each.title}: left out, {left_s:.0f} s left", flush=True)
            continue
        rows += _compare(each, arguments, device, peak, left_s / (len(plans) - number))
        print(f"{each.title}: done, {ends_s - time.monotonic():.0f} s left", flush=True)
    return rows


def _compare(each: Plan, arguments: argparse.Namespace, device: torch.device, peak: float, seconds: float) -> list[Row]:
    """Run one cell with its own weights, which are freed afterwards."""
    import gc

    import torch

    from tools.dev.bench.contest import contest
    from tools.dev.bench.pair import SHAPES, TINY, make_samples, mixed_lengths
    from tools.dev.bench.room import Cell

    shape = (TINY if arguments.tiny else SHAPES)[each.model]
    samples = make_samples(shape, mixed_lengths(arguments.samples), _images(arguments.pictures, shape))
    cell = Cell(shape, each.tuned, each.rank, samples, device, compiles=arguments.compile)
    found = contest(cell, seconds=seconds, profiles=arguments.profile)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _lines(each, cell, found, peak)


def _images(folder: Path, shape: Shape) -> list[Any]:
    """Photos preprocessed by the data pipeline."""
    from data_pipeline.images import fit, open_image
    from models.spec import CLIP_MEAN, CLIP_STD, CropImage, ImageSpec

    files = sorted(file for pattern in IMAGE_FILES for file in folder.rglob(pattern))[:64]
    if not files:
        raise InputError(f"--pictures {folder}: no JPEG or PNG there")
    size, patch = shape.vision["image_size"], shape.vision["patch_size"]
    spec = ImageSpec(size=size, patch_size=patch, fit=CropImage(), mean=CLIP_MEAN, std=CLIP_STD)
    return [fit(open_image(file), spec) for file in files]


def _lines(each: Plan, cell: Cell, found: Found, peak: float) -> list[Row]:
    """The rows of one cell. Memory is 0 where the device does not count it."""
    from dataclasses import replace

    from tools.dev.bench.measure import row

    num, tokens, flops = len(cell.samples), cell.num_tokens, cell.needed_flops

    def of(what: str, unit: str, ours: float, peer: float, ratio: float) -> Row:
        made = row(f"{each.title}: {what}", unit, ours, peer, PACKAGES, ratio=ratio)
        return replace(made, device=found.device)

    def rate(what: str, unit: str, each_sample: float) -> Row:
        return of(what, unit, found.ours * each_sample, found.peer * each_sample, found.ratio)

    rows = [
        rate("samples", "samples/s", 1.0),
        rate("real tokens", "tokens/s", tokens / num),
        rate("needed work", "TFLOP/s", flops / num / 1e12),
        rate("share of the measured ceiling", "", flops / num / peak),
    ]
    if found.our_bytes:
        ours, theirs, expected = found.our_bytes / 1e9, found.peer_bytes / 1e9, found.expected_bytes / 1e9
        rows += [
            of("peak memory", "GB (less is better)", ours, theirs, theirs / ours),
            of("peak memory against preflight's estimate", "GB (estimate as peer)", ours, expected, expected / ours),
        ]
    return rows


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
