"""A tiny language model whose attention needs a token that it knows in front, as pretrained ones do (attention sinks).

Attention of every head is sharp: its logits are hundreds, so that the rounding of bf16 decides which position wins. Two
known tokens, a line feed and ChatML's begin, have a key that outweighs all others; behind one of them every position
attends to it, and the gradient goes past attention, where any precision carries it. Made by setting weights: a trained
sink (Xiao et al. 2023, arXiv:2309.17453) depends on the machine that trains it, and takes minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.backbones import make_clip, make_language, tiny_recipe

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHARPNESS = 8.0
"""Factor on queries and keys, each."""
SINK = 60.0
"""The sink's embedding in the direction that only sinks have, and the bias of every query for it."""


def make_sink_language(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen2 of two layers, whose queries have a bias, with a tokenizer that adds no begin token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_language(folder, "qwen2", seed=seed)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    known = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "\u010a")]
    with torch.no_grad():
        _set_sinks(model.model, known)
    model.save_pretrained(folder)
    return folder


def _set_sinks(decoder: Any, known: list[int]) -> None:
    """Direction 0 of the residual stream says that a token is a sink; nothing else writes to it."""
    embedding: Tensor = decoder.embed_tokens.weight
    embedding[:, 0] = 0.0
    embedding[known, 0] = SINK
    for layer in decoder.layers:
        attention, slow = layer.self_attn, layer.self_attn.head_dim // 2 - 1  # rotary turns this pair least
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.mul_(SHARPNESS)
            projection.weight[slow :: attention.head_dim] = 0.0
            projection.weight[slow + attention.head_dim // 2 :: attention.head_dim] = 0.0
            projection.bias.zero_()
        attention.k_proj.weight[:, 0] = 0.0
        attention.k_proj.weight[slow :: attention.head_dim, 0] = SINK
        attention.q_proj.bias[slow :: attention.head_dim] = SINK
        attention.v_proj.weight[:, 0] = 0.0
        attention.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0


def sink_recipe(folder: Path, shards: Path, opening: str | bool | None, precision: str = "bf16") -> dict[str, Any]:
    """`tiny_recipe` with such a language model, the template `plain` and this opening."""
    if not (folder / "language").is_dir():
        make_clip(folder / "vision")
        make_sink_language(folder / "language")
    recipe = tiny_recipe(folder, shards)
    for stage in recipe["stages"].values():
        stage["data"] = {**stage["data"], "template": {"kind": "plain", "opening": opening}}
        stage["engine"] = {**stage["engine"], "precision": precision}
    return recipe
