"""Tiny weights in other formats: a DINOv2 under a head as PyTorch exports it to ONNX, and a Llama written as GGUF."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
PICTURE = 28
"""Pixels of the pictures that the ONNX graph takes; its positions are those of 42."""


def make_dinov2(*, image_size: int = 42) -> Any:
    """A random Dinov2Model of two layers, no two weights alike: the exporter merges equal ones."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=image_size, patch_size=14)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return model.eval()


def with_dinov2(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with a DINOv2 of `make_dinov2` as its tower, which is written to `folder`."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    make_dinov2().save_pretrained(folder / "dinov2")
    crop = {"height": 42, "width": 42}
    BitImageProcessorPil(size={"shortest_edge": 42}, crop_size=crop).save_pretrained(folder / "dinov2")
    recipe["model"]["vision"] = {"kind": "dinov2", "path": str(folder / "dinov2"), "feature_layer": -1}
    return recipe


class Headed(nn.Module):
    """A tower in a larger graph, as a package that uses one would export it."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(64, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        """A score of three kinds for each picture."""
        scores: Tensor = self.head(self.backbone(pixels).last_hidden_state[:, 0])
        return scores


def export_onnx(module: nn.Module, file: Path) -> Path:
    """The module as ONNX, by PyTorch's exporter of traces."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.zeros(1, 3, PICTURE, PICTURE),), str(file), dynamo=False, opset_version=14)
    return file


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a weight of transformers' Llama."""
    module, _, leaf = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{leaf}"
    number, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_GGUF_NAMES[inner]}.{leaf}"


def permuted(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key matrix in llama.cpp's order, which rotates neighbouring pairs."""
    width = weight.shape[0] // num_heads
    return weight.view(num_heads, 2, width // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(language: Path, file: Path, *, without: str = "") -> Path:
    """The Llama in the directory `language` as GGUF, one matrix of it in Q8_0; `without` is left out."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    config = model.config
    writer = GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, language)
    for name, parameter in model.named_parameters():
        if name == without:
            continue
        value = parameter.detach()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            value = permuted(value, heads) if part in name else value
        values = value.numpy().astype(np.float32)
        if name.endswith("layers.0.mlp.up_proj.weight"):
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: Any, language: Path) -> None:
    stored = json.loads((language / "tokenizer.json").read_text(encoding="utf-8"))
    special = {entry["content"]: entry["id"] for entry in stored["added_tokens"]}
    vocabulary = {**stored["model"]["vocab"], **special}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])  # control, or normal
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_bos_token_id(special["<|im_start|>"])
    writer.add_eos_token_id(special["<|im_end|>"])
    writer.add_pad_token_id(special["<|endoftext|>"])
    writer.add_chat_template(TEMPLATE)
