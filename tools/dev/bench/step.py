"""`python -m tools.bench.step`: the work and memory of a training step, ours compared with LLaVA's implementation, on
the same samples.

    FLOPs a sample        counted by torch, executed and over what is needed     of a real shape, without its weights
    bytes for backward    what autograd holds after the forward                  of a real shape, without its weights
    positions computed    over real tokens
    ranks waiting         the most expensive rank's FLOPs over the mean's, 8 ranks of 16 rows, mixed lengths
    loss head             CPU seconds of forward and backward, 100 of 726 positions supervised

The peer is transformers' Llava with padded rows, logits everywhere and every layer recomputed in the backward.
Counts are exact and need no accelerator: tensors have shapes and no values. Owns the comparisons; `pair` owns the two
implementations, `count` the counters.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from models.common.errors import run_cli

if TYPE_CHECKING:
    from data_pipeline.batch import Batch
    from tools.dev.bench.measure import Row
    from tools.dev.bench.pair import Shape, Tuned

PACKAGES = ["torch", "transformers", "peft"]
ROWS, ROW_TOKENS = 4, 4096
LESS = "(less is better)"
HEADS = {"qwen05b": (896, 151936, "float32"), "vicuna7b": (4096, 32000, "bfloat16")}
"""Width, vocabulary and the dtype of a frozen head."""


@dataclass(frozen=True)
class Counted:
    """FLOPs, saved bytes and positions of one way's step over some samples."""

    flops: int
    saved_bytes: int
    positions: int


def main(argv: list[str]) -> int:
    """Count and time, print the table and write runs/bench/step.json."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.step", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["vicuna7b", "qwen05b"], choices=["vicuna7b", "qwen05b"])
    parser.add_argument("--mixed", type=int, default=8, help="samples of mixed lengths")
    parser.add_argument("--rounds", type=int, default=2, help="of the timed loss heads")
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    arguments = parser.parse_args(argv)

    from tools.dev.bench.balance import balance_rows
    from tools.dev.bench.measure import report
    from tools.dev.bench.pair import SHAPES, Length, mixed_lengths

    equal, mixed = [Length(150, 100)] * 4, mixed_lengths(arguments.mixed)
    rows: list[Row] = []
    for name in arguments.shapes:
        rows += count_rows(SHAPES[name], f"{name} stage 1, 726 tokens", "projector", equal)
        rows += count_rows(SHAPES[name], f"{name} stage 1, mixed lengths", "projector", mixed)
        rows += count_rows(SHAPES[name], f"{name} LoRA r16, mixed lengths", "lora", mixed)
    rows += balance_rows()
    rows += [head_row(*HEADS[name], rounds=arguments.rounds) for name in arguments.heads]
    report("step", rows)
    return 0


def count_rows(shape: Shape, title: str, tuned: Tuned, lengths: Sequence[Any]) -> list[Row]:
    """The counts of one stage over samples of these lengths, both ways."""
    from tools.dev.bench.measure import row
    from tools.dev.bench.pair import make_samples, needed, packed_batches, padded_batches, plan
    from trainer.flops.counts import count

    samples = make_samples(shape, lengths, [_blank(shape)])
    padded, packed = padded_batches(samples, shape, ROWS), packed_batches(samples, shape, ROW_TOKENS, 1)
    ours = count_whole(shape, tuned, packed, is_peer=False)
    peer = count_whole(shape, tuned, padded, is_peer=True)
    keeping = count_whole(shape, tuned, padded, is_peer=True, recompute=False)
    flops, num, tokens = needed(shape, plan(tuned), count(packed)), len(lengths), sum(b.num_tokens for b in packed)

    def less(what: str, unit: str, mine: float, theirs: float) -> Row:
        return row(f"{title}: {what}", f"{unit} {LESS}", mine, theirs, PACKAGES, ratio=theirs / mine)

    return [
        less("executed", "TFLOP a sample", ours.flops / num / 1e12, peer.flops / num / 1e12),
        less("executed over needed", "", ours.flops / flops, peer.flops / flops),
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


def count_whole(
    shape: Shape, tuned: Tuned, batches: Sequence[Batch], *, is_peer: bool, recompute: bool = True
) -> Counted:
    """`count_step`, from towers of 2 and 3 layers: each further layer of a tower adds the same."""
    options = {"is_peer": is_peer, "recompute": recompute}
    seen, spoken = int(shape.vision["num_hidden_layers"]), int(shape.language["num_hidden_layers"])
    few, one_seen, one_spoken = (
        count_step(_with_layers(shape, *layers), tuned, batches, **options) for layers in ((2, 2), (3, 2), (2, 3))
    )

    def whole(base: int, with_seen: int, with_spoken: int) -> int:
        return base + (with_seen - base) * (seen - 2) + (with_spoken - base) * (spoken - 2)

    return Counted(
        whole(few.flops, one_seen.flops, one_spoken.flops),
        whole(few.saved_bytes, one_seen.saved_bytes, one_spoken.saved_bytes),
        few.positions,
    )


def _with_layers(shape: Shape, seen: int, spoken: int) -> Shape:
    return replace(
        shape,
        vision={**shape.vision, "num_hidden_layers": seen},
        language={**shape.language, "num_hidden_layers": spoken},
    )


def count_step(
    shape: Shape, tuned: Tuned, batches: Sequence[Batch], *, is_peer: bool, recompute: bool = True
) -> Counted:
    """A forward and backward of each batch in bf16, on tensors without values; the bytes of all batches added up.

    Without `recompute` only the peer's bytes are measured: its backward is not run and its FLOPs are not counted.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from tools.dev.bench.count import as_on_a_gpu, counting_saved_bytes, empty_of_values, flops_of
    from tools.dev.bench.pair import PeerStep, build_our_step, build_ours, build_peer
    from trainer.config.schema import EngineConfig
    from trainer.engine.train_step import configure_model

    peer = build_peer(shape, torch.bfloat16, torch.device("meta"))
    ours = build_ours(peer, shape)
    if is_peer:
        step: Any = PeerStep(peer, ours, tuned, precision="bf16", recompute=recompute)
    else:
        step = build_our_step(ours, tuned, precision="bf16")
        configure_model(ours, EngineConfig(precision="bf16"))
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    step, flops, saved_bytes, positions = empty_of_values(step, mode), 0, 0, 0
    for batch in batches:
        with mode, as_on_a_gpu():
            fake = batch.map_tensors(mode.from_tensor)
            losses: list[Any] = []
            with counting_saved_bytes(step) as saved:
                flops += flops_of(lambda fake=fake, losses=losses: losses.append(step(fake)))  # type: ignore[misc]
                saved_bytes += saved.total
            loss = losses[0] if is_peer else losses[0].loss_sum
            if recompute:
                flops += flops_of(loss.backward)
        positions += batch.num_positions if is_peer else len(batch.layout.real_N)
    return Counted(flops, saved_bytes, positions)


def head_row(
    width: int, vocabulary: int, dtype: str, *, rounds: int, num_tokens: int = 726, num_supervised: int = 100
) -> Row:
    """The loss head of one sample over a frozen head, forward and backward, on one core."""
    import torch
    import torch.nn.functional as F

    from models.spec import IGNORE_INDEX
    from tools.dev.bench.measure import compare, per_core_second
    from trainer.objectives.chunked_loss import head_losses

    torch.manual_seed(0)
    computed_in: torch.dtype = getattr(torch, dtype)
    head = torch.nn.Linear(width, vocabulary, bias=False, dtype=computed_in).requires_grad_(False)
    hidden = torch.randn(num_tokens, width, dtype=computed_in).requires_grad_()
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
        what = f"loss head, {num_supervised} of {num_tokens} positions, {width} x {vocabulary}, {dtype}"
        works: list[Callable[[], float]] = [per_core_second(work) for work in (ours, peer)]
        return compare(what, "per core-second", works[0], works[1], rounds=rounds, packages=PACKAGES)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
