"""Our step and the plain Hugging Face path: the same loss and the same gradients, over architectures and layouts."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.batch import Batch
from tools.bench.pair import (
    Length,
    PeerStep,
    Shape,
    Tuned,
    build_our_step,
    build_ours,
    build_peer,
    make_samples,
    packed_batches,
    padded_batches,
)

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 12,
}
LANGUAGE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
SHAPES = {
    "llama": Shape(VISION, "llama", LANGUAGE),
    "smollm": Shape(VISION, "llama", {**LANGUAGE, "tie_word_embeddings": True, "rope_theta": 100000}),
    "qwen2": Shape(VISION, "qwen2", LANGUAGE),
    "qwen3": Shape(VISION, "qwen3", {**LANGUAGE, "head_dim": 24}),
}
LENGTHS = [Length(9, 4), Length(31, 20), Length(5, 1, 0), Length(17, 9, 2), Length(3, 1), Length(24, 8)]


def samples(shape: Shape) -> list[Any]:
    pictures = np.random.default_rng(1).integers(0, 256, (5, 48, 48, 3), dtype=np.uint8)
    return make_samples(shape, LENGTHS, pictures)


def peer_of(shape: Shape) -> Any:
    torch.manual_seed(0)
    return build_peer(shape, torch.float32, torch.device("cpu"))


def run(step: Any, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of all batches and what they add up to in the gradients, under names that both ways share."""
    total = 0.0
    for batch in batches:
        sums = step(batch)
        loss = sums if isinstance(sums, torch.Tensor) else sums.loss_sum
        loss.backward()
        total += float(loss.detach())
    found = {}
    for name, parameter in step.named_parameters():
        if parameter.grad is not None:
            short = name.replace("model.multi_modal_projector.", "projector.").replace(
                "model.model.language_model.", "L."
            )
            short = short.replace("vlm.language.model.", "L.").replace("vlm.language.", "").removeprefix("vlm.")
            found[short.removeprefix("model.")] = parameter.grad
    return total, found


def stir_adapters(step: Any) -> Any:
    """Fresh adapters are 0 in B; with values there, A has a gradient too and the forward is another one."""
    for name, parameter in step.named_parameters():
        if ".lora_B." in name:
            with torch.no_grad():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
                )
    return step


def assert_same(ours: tuple[float, Any], peers: tuple[float, Any], tolerance: float) -> None:
    """Relative to the largest gradient of each parameter."""
    assert ours[0] == pytest.approx(peers[0], rel=tolerance)
    assert ours[1].keys() == peers[1].keys()
    for name, gradient in ours[1].items():
        scale = float(peers[1][name].abs().max())
        difference = float((gradient - peers[1][name]).abs().max())
        assert difference <= tolerance * max(scale, 1e-3), (name, difference, scale)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("tuned", ["projector", "lora", "full"])
def test_packed_and_padded_give_the_plain_path_s_loss_and_gradients(kind: str, tuned: Tuned) -> None:
    """fp32 to 1e-5, the peer over padded rows with every logit and every layer computed again."""
    shape = SHAPES[kind]
    peer = peer_of(shape)
    ours = build_ours(peer, shape)
    given = copy.deepcopy(ours)
    plain = run(PeerStep(peer, ours, tuned, precision="fp32", recompute=True), padded_batches(samples(shape), shape, 6))
    packed = run(build_our_step(ours, tuned, precision="fp32"), packed_batches(samples(shape), shape, 70, 2))
    assert_same(packed, plain, 1e-5)
    padded = run(build_our_step(given, tuned, precision="fp32"), padded_batches(samples(shape), shape, 4))
    assert_same(padded, plain, 1e-5)
