"""The decoder and its heads in plain tensor arithmetic, one position after another: what the real ones must equal."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x * x).mean().add(epsilon).sqrt() * weight


def sinusoid(position: int, width: int) -> Tensor:
    half = width // 2
    angles = [position / 10000.0 ** (2 * number / width) for number in range(half)]
    return torch.tensor([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])


def layer(weights: dict[str, Tensor], states: list[Tensor], num_heads: int, epsilon: float) -> list[Tensor]:
    """Each position looks at itself and those before it; `weights` are the layer's, by their names in it."""
    normed = [rms(x, weights["input_layernorm.weight"], epsilon) for x in states]
    q, k, v = ([weights[f"self_attn.{name}_proj.weight"] @ x for x in normed] for name in "qkv")
    width = q[0].numel() // num_heads
    finished = []
    for place, state in enumerate(states):
        attended = []
        for head in range(num_heads):
            part = slice(head * width, (head + 1) * width)
            scores = torch.stack([q[place][part] @ k[other][part] / width**0.5 for other in range(place + 1)])
            shares = scores.exp() / scores.exp().sum()
            attended.append(sum(share * v[other][part] for other, share in enumerate(shares)))
        middle = state + weights["self_attn.o_proj.weight"] @ torch.cat(attended)
        inner = rms(middle, weights["post_attention_layernorm.weight"], epsilon)
        gate = weights["mlp.gate_proj.weight"] @ inner
        gated = gate / (1 + (-gate).exp()) * (weights["mlp.up_proj.weight"] @ inner)
        finished.append(middle + weights["mlp.down_proj.weight"] @ gated)
    return finished


def inside(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def hidden(model: Any, embedded: list[Tensor]) -> list[Tensor]:
    """The last normed states of one sample, from what stands in the place of its embeddings."""
    weights, config = dict(model.named_parameters()), model.config
    states = [x + sinusoid(place, len(x)) for place, x in enumerate(embedded)]
    for place in range(config.num_hidden_layers):
        named = inside(weights, f"model.layers.{place}.")
        states = layer(named, states, config.num_attention_heads, config.rms_norm_eps)
    return [rms(x, weights["model.norm.weight"], config.rms_norm_eps) for x in states]


def embed(model: Any, ids: list[int]) -> list[Tensor]:
    table = model.model.embed_tokens.weight
    return [table[token] * table.shape[1] ** 0.5 for token in ids]


def parallel(heads: Any, states: list[Tensor], num_heads: int, epsilon: float) -> list[list[Tensor]]:
    """For each head the states that predict its token."""
    weights = dict(heads.named_parameters())
    found = []
    for number in range(heads.num_drafts):
        out = layer(inside(weights, f"layers.{number}."), states, num_heads, epsilon)
        found.append([rms(x, weights[f"norms.{number}.weight"], epsilon) for x in out])
    return found


def sequential(
    module: Any, states: list[Tensor], following: list[Tensor], num_heads: int, epsilon: float
) -> list[Tensor]:
    """The states that predict the token behind the next one, whose embeddings are `following`."""
    weights = dict(module.named_parameters())
    joined = [
        weights["join.weight"]
        @ torch.cat([rms(x, weights["state_norm.weight"], epsilon), rms(y, weights["token_norm.weight"], epsilon)])
        for x, y in zip(states, following, strict=True)
    ]
    out = layer(inside(weights, "layers.0."), joined, num_heads, epsilon)
    return [rms(x, weights["norm.weight"], epsilon) for x in out]
