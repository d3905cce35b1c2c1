"""Milliseconds per token of one answer: ours, transformers' generate, and the lower bound from reading the weights.

    python -m tools.bench.decode BUNDLE [--device cuda]        make bench-decode: the quickstart's bundle
    python -m tools.bench.decode --drawn vicuna7b --to nf4     a model of that shape with random weights

One row with one image. A token's time is that of the tokens after the first, so that the prompt is not included.
The floor is the bytes that a token must read (all weights of the language model but the embedding's other rows) at the
rate at which this device copies memory. Ours and the peer alternate, and both are forced to the same number of tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.errors import InputError, run_cli

if TYPE_CHECKING:
    import torch

    from eval.predictor import Predictor

    Opened = tuple[Any, torch.device, dict[str, torch.Tensor]]
    """A model, its device, and its inputs for one question about an image."""

NUM_WORDS = 40
"""Tokens of text around the image of a drawn question."""


def main(argv: list[str]) -> int:
    """Open the bundle, run both in turns, and print the table."""
    parser = argparse.ArgumentParser(prog="tools.bench.decode", description="Milliseconds a token of one answer.")
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument(
        "--drawn", choices=["vicuna7b", "qwen15b", "qwen05b", "tiny"], help="draw weights, open nothing"
    )
    parser.add_argument("--to", choices=["bf16", "nf4"], default="nf4", help="of a drawn model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=64, help="written by each run")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    if arguments.tokens < 2 or arguments.rounds < 1:
        raise InputError("--tokens: at least 2 are needed, and of --rounds 1")
    if (arguments.bundle is None) == (arguments.drawn is None):
        raise InputError("give a BUNDLE, or a shape by --drawn")
    from tools.dev.bench.measure import compare, report, row

    opened = _open(arguments.bundle, arguments.device) if arguments.bundle else _draw(arguments)
    model, device, inputs = opened
    ours, peer = (_rate(work, device, arguments.tokens) for work in (_ours(*opened), _peer(model, inputs)))
    packages = ["torch", "transformers", "bitsandbytes"]
    speeds = compare("tokens/s", "tokens/s", ours, peer, rounds=arguments.rounds, packages=packages)
    floor_ms = 1000 * bytes_per_token(model) / copy_rate(device)
    ours_ms, peer_ms = 1000 / speeds.ours, 1000 / speeds.peer
    rows = [
        speeds,
        row("ms a token", "ms", ours_ms, peer_ms, packages, ratio=peer_ms / ours_ms),
        row("share of the bytes' floor", "", floor_ms / ours_ms, floor_ms / peer_ms, packages),
    ]
    print(f"floor: {bytes_per_token(model) / 1e6:.2f} MB a token, {floor_ms:.4f} ms on {device}")
    report("decode", rows)
    return 0


def prompt(predictor: Predictor) -> dict[str, torch.Tensor]:
    """A question about a drawn image, as the model's inputs."""
    from data_pipeline.record import Turn
    from eval.prompts import collate, encode
    from eval.query import Query
    from tools.export.golden import drawn

    probe = drawn(1)[0]
    encoded = encode(predictor.processor, Query((probe.image,), (Turn("user", probe.question),)))
    return collate([encoded], pad_id=0, side="left", device=predictor.device)


def _open(bundle: Path, device: str) -> Opened:
    """A bundle's model, and a question about a drawn image."""
    from eval.predictor import Predictor

    predictor = Predictor.open(bundle, device=device)
    return predictor.model, predictor.device, prompt(predictor)


def _draw(arguments: argparse.Namespace) -> Opened:
    """A model of a published shape with random weights, its language model in NF4 if asked, and a random question."""
    import torch

    from tools.dev.bench.pair import SHAPES, TINY, build_peer

    shape = TINY["vicuna7b"] if arguments.drawn == "tiny" else SHAPES[arguments.drawn]
    has_gpu = torch.cuda.is_available()
    device = torch.device(("cuda" if has_gpu else "cpu") if arguments.device == "auto" else arguments.device)
    torch.manual_seed(0)
    model = build_peer(shape, torch.bfloat16, device)
    if arguments.to == "nf4":
        _quantize_linears(model.model.language_model)
    image = torch.full((1, shape.tokens_per_image), shape.text.image_token_id)
    words = torch.randint(1, 100, (1, NUM_WORDS))
    side = shape.vision["image_size"]
    inputs = {"input_ids": torch.cat([words[:, :2], image, words[:, 2:]], dim=1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    pixels = torch.randn(1, 3, side, side, dtype=torch.bfloat16)
    return model, device, {name: value.to(device) for name, value in {**inputs, "pixel_values": pixels}.items()}


def _quantize_linears(module: Any) -> None:
    """NF4 in place of each linear layer, double quantized in blocks of 64, as `sightline quantize` writes them."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear:
                with torch.device("meta"):
                    made = Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.bfloat16)
                made.bias = layer.bias
                made.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
                setattr(parent, name, made.to(layer.weight.device))


def _ours(model: Any, device: torch.device, inputs: dict[str, torch.Tensor]) -> Callable[[int], None]:
    from eval.generation import write_greedily
    from eval.kv_cache import DynamicKVCache, is_fixable
    from eval.static_cache import StaticCachePool

    is_fixed = device.type == "cuda" and is_fixable(model)
    length = inputs["input_ids"].shape[1]
    pool = StaticCachePool(model, device)

    def write(num_tokens: int) -> None:
        cache = pool.take(length + num_tokens) if is_fixed else DynamicKVCache(model)
        list(write_greedily(model, inputs, cache, num_tokens))
        if is_fixed:
            pool.give(cache)  # type: ignore[arg-type]

    return write


def _peer(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[int], None]:
    given = {name: value for name, value in inputs.items() if name != "position_ids"}

    def write(num_tokens: int) -> None:
        model.generate(**given, do_sample=False, min_new_tokens=num_tokens, max_new_tokens=num_tokens)

    return write


def _rate(write: Callable[[int], None], device: torch.device, num_tokens: int) -> Callable[[], float]:
    """Tokens per second after the first."""

    def seconds(amount: int) -> float:
        _wait(device)
        start_s = time.perf_counter()
        write(amount)
        _wait(device)
        return time.perf_counter() - start_s

    return lambda: (num_tokens - 1) / max(seconds(num_tokens) - seconds(1), 1e-9)


def bytes_per_token(model: Any) -> int:
    """Bytes of the weights that one more token reads, quantization scales included."""
    text, head = model.model.language_model, model.lm_head
    embedding = text.get_input_embeddings().weight
    parameters = {id(each): each for module in (text, head) for each in module.parameters()}
    total = sum(each.numel() * each.element_size() for each in parameters.values() if each is not embedding)
    if head.weight is embedding:
        total += embedding.numel() * embedding.element_size()
    for module in text.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            total += sum(value.numel() * value.element_size() for value in state.as_dict(packed=True).values())
    return int(total)


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a large copy reads on this device; the best of five."""
    import torch

    source = torch.ones(1 << 26, dtype=torch.float32, device=device)
    target, best_s = torch.empty_like(source), float("inf")
    for _ in range(5):
        _wait(device)
        start_s = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * source.numel() * source.element_size() / best_s  # read and written


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
