"""`python -m tools.bench.step`: what a training step computes and keeps, ours beside LLaVA's way, on the same samples.

    FLOPs a sample        counted by torch, executed and over what is needed     of a real shape, without its weights
    bytes for backward    what autograd holds after the forward                  of a real shape, without its weights
    positions computed    over real tokens
    loss head             CPU seconds of forward and backward, 100 of 726 positions supervised

The peer is transformers' Llava with padded rows, logits everywhere and every layer computed again in the backward.
Counts are exact and need no accelerator: tensors have shapes and no values. Owns what is compared; `pair` owns the two
ways, `count` the counters.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from models.errors import run_cli

if TYPE_CHECKING:
    from data_pipeline.batch import Batch
    from tools.bench.measure import Row
    from tools.bench.pair import Shape, Tuned

PACKAGES = ["torch", "transformers", "peft"]
ROWS, ROW_TOKENS = 4, 4096
LESS = "(less is better)"


@dataclass(frozen=True)
class Counted:
    """One way's step over some samples."""

    flops: int
    saved_bytes: int
    positions: int


def main(argv: list[str]) -> int:
    """Count and time, print the table and write runs/bench/step.json."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.step", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["vicuna7b", "qwen05b"], choices=["vicuna7b", "qwen05b"])
    parser.add_argument("--mixed", type=int, default=16, help="samples of mixed lengths")
    parser.add_argument("--rounds", type=int, default=3, help="of the timed loss head")
    parser.add_argument("--head", type=int, nargs=2, default=[1024, 32000], metavar=("WIDTH", "VOCABULARY"))
    arguments = parser.parse_args(argv)

    from tools.bench.measure import report
    from tools.bench.pair import SHAPES, Length, mixed_lengths

    equal, mixed = [Length(150, 100)] * 4, mixed_lengths(arguments.mixed)
    rows: list[Row] = []
    for name in arguments.shapes:
        rows += count_rows(SHAPES[name], f"{name} stage 1, 726 tokens", "projector", equal)
        rows += count_rows(SHAPES[name], f"{name} stage 1, mixed lengths", "projector", mixed)
        rows += count_rows(SHAPES[name], f"{name} LoRA r16, mixed lengths", "lora", mixed)
    rows.append(head_row(*arguments.head, rounds=arguments.rounds))
    report("step", rows)
    return 0


def count_rows(shape: Shape, title: str, tuned: Tuned, lengths: Sequence[Any]) -> list[Row]:
    """The counts of one stage over samples of these lengths, both ways."""
    from tools.bench.measure import row
    from tools.bench.pair import make_samples, packed_batches, padded_batches

    samples = make_samples(shape, lengths, [_blank(shape)])
    padded, packed = padded_batches(samples, shape, ROWS), packed_batches(samples, shape, ROW_TOKENS, 1)
    ours = _count(shape, tuned, packed, is_peer=False)
    peer = _count(shape, tuned, padded, is_peer=True)
    keeping = _count(shape, tuned, padded, is_peer=True, recompute=False)
    needed, num, tokens = _needed(shape, tuned, packed), len(lengths), sum(batch.num_tokens for batch in packed)

    def less(what: str, unit: str, mine: float, theirs: float) -> Row:
        return row(f"{title}: {what}", f"{unit} {LESS}", mine, theirs, PACKAGES, ratio=theirs / mine)

    return [
        less("executed", "TFLOP a sample", ours.flops / num / 1e12, peer.flops / num / 1e12),
        less("executed over needed", "", ours.flops / needed, peer.flops / needed),
        less(
            "kept for the backward, nothing recomputed",
            "GB a sample",
            ours.saved_bytes / num / 1e9,
            keeping.saved_bytes / num / 1e9,
        ),
        less("kept, the peer recomputing", "GB a sample", ours.saved_bytes / num / 1e9, peer.saved_bytes / num / 1e9),
        less("positions over real tokens", "", ours.positions / tokens, peer.positions / tokens),
    ]


def _blank(shape: Shape) -> Any:
    import numpy as np

    return np.zeros((shape.vision["image_size"], shape.vision["image_size"], 3), dtype=np.uint8)


def _count(shape: Shape, tuned: Tuned, batches: Sequence[Batch], *, is_peer: bool, recompute: bool = True) -> Counted:
    """A forward and backward of each batch in bf16, on tensors without values; the bytes of all batches added up."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from data_pipeline.batch import TENSORS
    from tools.bench.count import counting_saved_bytes, empty_of_values, flops_of
    from tools.bench.pair import PeerStep, build_our_step, build_ours, build_peer
    from trainer.config import EngineConfig
    from trainer.step import set_up

    peer = build_peer(shape, torch.bfloat16, torch.device("meta"))
    ours = build_ours(peer, shape)
    if is_peer:
        step: Any = PeerStep(peer, ours, tuned, precision="bf16", recompute=recompute)
    else:
        step = build_our_step(ours, tuned, precision="bf16")
        set_up(ours, EngineConfig(precision="bf16"))
    mode = FakeTensorMode()
    step, flops, saved_bytes, positions = empty_of_values(step, mode), 0, 0, 0
    for batch in batches:
        with mode:
            fake = replace(batch, **{name: mode.from_tensor(getattr(batch, name)) for name in TENSORS})
            losses: list[Any] = []
            with counting_saved_bytes(step) as saved:
                flops += flops_of(lambda fake=fake, losses=losses: losses.append(step(fake)))  # type: ignore[misc]
                saved_bytes += saved.total
            loss = losses[0] if is_peer else losses[0].loss_sum
            flops += flops_of(loss.backward)
        positions += batch.input_ids_BL.numel() if is_peer else len(batch.real_N)
    return Counted(flops, saved_bytes, positions)


def _needed(shape: Shape, tuned: Tuned, batches: Sequence[Batch]) -> float:
    """FLOPs that any program must compute for these samples, by arithmetic."""
    from models.config import ModelConfig
    from tools.bench.pair import plan
    from trainer.flops import count, needed_flops
    from trainer.shapes import model_shape

    model = ModelConfig.model_validate(
        {
            "vision": {"kind": "clip", "path": "", "feature_layer": -2},
            "projector": {"kind": "mlp"},
            "language": {"kind": "pretrained", "path": ""},
        }
    )
    parts = needed_flops(model_shape(model, shape.vision, shape.language), plan(tuned), count(batches))
    return sum(part.total for part in parts.values())


def head_row(width: int, vocabulary: int, *, rounds: int, num_tokens: int = 726, num_supervised: int = 100) -> Row:
    """The loss head of one sample over a frozen head, forward and backward, in fp32 on one core."""
    import torch
    import torch.nn.functional as F

    from models.spec import IGNORE_INDEX
    from tools.bench.measure import compare, per_core_second
    from trainer.chunked_loss import head_losses

    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(num_tokens, width, requires_grad=True)
    targets = torch.full((num_tokens,), IGNORE_INDEX)
    targets[-num_supervised:] = torch.randint(0, vocabulary, (num_supervised,))
    wanted = (targets != IGNORE_INDEX).nonzero().squeeze(1)

    def ours() -> int:
        head_losses(head, hidden.index_select(0, wanted), targets[wanted])[0].sum().backward()
        return 1

    def peer() -> int:
        F.cross_entropy(head(hidden).float(), targets, ignore_index=IGNORE_INDEX).backward()
        return 1

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        what = f"loss head, {num_supervised} of {num_tokens} positions, {width} x {vocabulary}"
        works: list[Callable[[], float]] = [per_core_second(work) for work in (ours, peer)]
        return compare(what, "per core-second", works[0], works[1], rounds=rounds, packages=PACKAGES)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
