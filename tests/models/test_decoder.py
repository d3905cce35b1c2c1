"""Our step and the plain Hugging Face path: the same loss and the same gradients, over architectures and layouts."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data_pipeline.batch import Batch
from models import attention
from tools.dev.bench.count import counting_saved_bytes, empty_of_values
from tools.dev.bench.pair import (
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
    "mistral": Shape(VISION, "mistral", {**LANGUAGE, "head_dim": 16, "sliding_window": 16}),  # most samples are longer
}
LENGTHS = [Length(9, 4), Length(31, 20), Length(5, 1, 0), Length(17, 9, 2), Length(3, 1), Length(24, 8)]


def samples(shape: Shape) -> list[Any]:
    images = np.random.default_rng(1).integers(0, 256, (5, 48, 48, 3), dtype=np.uint8)
    return make_samples(shape, LENGTHS, images)


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


@pytest.mark.parametrize("kind", SHAPES)
def test_in_bf16_our_rounding_is_no_worse_than_the_plain_path_s(kind: str) -> None:
    """Against fp32 over the same weights: the norm of the error in each gradient, which is 3 to 7 % for both."""

    def gradients(peers: bool, dtype: torch.dtype, precision: str) -> dict[str, torch.Tensor]:
        peer = peer_of(SHAPES[kind])
        for parameter in peer.parameters():
            parameter.data = parameter.data.bfloat16().to(dtype)
        ours, batches = build_ours(peer, SHAPES[kind]), padded_batches(samples(SHAPES[kind]), SHAPES[kind], 6)
        if peers:
            step: Any = PeerStep(peer, ours, "lora", precision=precision, recompute=False)
        else:
            step = build_our_step(ours, "lora", precision=precision)
        return run(stir_adapters(step), batches)[1]

    exact = gradients(False, torch.float32, "fp32")
    ours, peers = (gradients(peers, torch.bfloat16, "bf16") for peers in (False, True))
    errors = [
        [float((found[name] - value).norm() / value.norm()) for name, value in exact.items()] for found in (ours, peers)
    ]
    assert sum(errors[0]) < 1.1 * sum(errors[1])
    assert max(errors[0]) < 1.2 * max(errors[1])


def test_recomputed_layers_give_the_same_and_keep_less() -> None:
    shape = SHAPES["qwen3"]
    ours = build_ours(peer_of(shape), shape)
    step, batches = (
        stir_adapters(build_our_step(ours, "lora", precision="fp32")),
        padded_batches(samples(shape), shape, 4),
    )
    found, kept = [], []
    for num_layers in (0, 2):
        ours.decoder.recompute(num_layers)
        with counting_saved_bytes() as saved:
            loss = step(batches[0]).loss_sum
        kept.append(saved.total)
        loss.backward()
        found.append({name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None})
        step.zero_grad()
    assert kept[1] < 0.6 * kept[0]
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def masked_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Any, scale: float) -> torch.Tensor:
    """Stands for a CUDA kernel: all samples in one call, told apart by where they begin."""
    places = torch.arange(q.shape[0])
    samples = torch.bucketize(places, segments.starts_G1.long(), right=True)
    allowed = (samples[:, None] == samples[None]) & (places[:, None] >= places[None])
    states = (part.transpose(0, 1).unsqueeze(0).float() for part in (q, k, v))  # as what it is compared with
    with torch.autocast("cpu", enabled=False):
        attended = torch.nn.functional.scaled_dot_product_attention(*states, allowed, scale=scale, enable_gqa=True)
    return attended[0].transpose(0, 1).to(q.dtype)


@pytest.mark.slow
def test_compiled_layers_and_kernels_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16, as kernels take no other; one graph a layer, compiled once for all layers and all sizes of batches.

    Not inductor: that is minutes of C++.
    """
    shape = SHAPES["llama"]
    ours = build_ours(peer_of(shape), shape)
    step, batches = build_our_step(ours, "projector", precision="bf16"), padded_batches(samples(shape), shape, 2)
    one_by_one = run(step, batches)
    step.zero_grad()
    of = attention.Segments.of
    monkeypatch.setattr(attention.Segments, "of", lambda *given: replace(of(*given), kernel=masked_kernel))
    assert_same(run(step, batches), one_by_one, 2e-2)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    step.zero_grad()
    ours.decoder.compile(backend=backend)
    assert_same(run(step, batches), one_by_one, 2e-2)
    assert len(graphs) == 2  # a layer, and the last one


@pytest.mark.slow
def test_nothing_but_the_lengths_is_read_from_the_device() -> None:
    """Tensors without values refuse every look at them: `.item()`, boolean masks, `nonzero`."""
    shape, batches = SHAPES["qwen2"], packed_batches(samples(SHAPES["qwen2"]), SHAPES["qwen2"], 70, 2)
    mode = FakeTensorMode()
    step = empty_of_values(build_our_step(build_ours(peer_of(shape), shape), "lora", precision="bf16"), mode)
    with mode:
        for batch in batches:
            sums = step(batch.map_tensors(mode.from_tensor))
            sums.loss_sum.backward()
            assert sums.row_loss_sums_B.shape == (len(batch.keys),)


@torch.no_grad()
@pytest.mark.parametrize("kind", SHAPES)
def test_a_prepared_model_generates_as_before(kind: str) -> None:
    """Greedy with a cache, prompts padded on the left, eight tokens each."""
    language = build_ours(peer_of(SHAPES[kind]), SHAPES[kind]).language
    plain = type(language)(language.config).eval()
    plain.set_attn_implementation("sdpa")
    plain.load_state_dict(language.state_dict())
    assert {type(layer.mlp).__name__ for layer in language.model.layers} == {"MemoryEfficientMLP"}
    assert {type(layer.mlp).__name__ for layer in plain.model.layers}.isdisjoint({"MemoryEfficientMLP"})
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    options: dict[str, Any] = {"attention_mask": (ids != 0).long(), "max_new_tokens": 8, "do_sample": False}
    options["pad_token_id"] = 0
    assert language.generate(ids, **options).tolist() == plain.generate(ids, **options).tolist()
