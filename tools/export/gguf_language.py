"""A bundle's language model as GGUF, in llama.cpp's names, by the library `gguf`.

    language_model.model.layers.0.self_attn.q_proj.weight --> blk.0.attn_q.weight, for Llama with rows in another order
    tokenizer.json --> `tools.export.gguf_tokenizer`
    chat_template.jinja --> the same, with a line feed behind an image, as training puts one there

Matrices keep the bundle's dtype, vectors are fp32. What llama.cpp would compute otherwise is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from models.common.sharded import TensorFiles

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""`model_type` of transformers -> gguf's MODEL_ARCH."""

MARKER_END = "__>"
"""What an image's placeholder in llama.cpp ends with: `<__media__>`, or a random one of its server."""


def write_language(bundle: Path, file: Path, config: Any, name: str) -> int:
    """Write the language model; returns the number of tensors.

    Raises:
        InputError: llama.cpp has no such architecture, rotation or tokenizer.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

    from models.common.sharded import TensorFiles
    from tools.export.gguf_tokenizer import add_tokenizer, opening_space

    text = config.text_config
    architecture = _architecture(text, bundle)
    writer = GGUFWriter(str(file), MODEL_ARCH_NAMES[MODEL_ARCH[architecture]], use_temp_file=True)
    writer.add_name(name)
    _add_shape(writer, text, bundle)
    add_tokenizer(writer, bundle, int(text.vocab_size))
    template = (bundle / "chat_template.jinja").read_text(encoding="utf-8")
    writer.add_chat_template(opening_space(bundle, template) + chat_template(template))
    names = get_tensor_name_map(MODEL_ARCH[architecture], text.num_hidden_layers)
    num = 0
    for in_file, value in language_tensors(TensorFiles.open(bundle), text):
        found = names.get_name(in_file, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"{bundle}: llama.cpp's {architecture} has no tensor for {in_file}; its class is another")
        add_tensor(writer, found, value)
        num += 1
    write_out(writer)
    return num


def _architecture(text: Any, bundle: Path) -> str:
    if text.model_type not in ARCHITECTURES:
        raise InputError(
            f"{bundle}: a language model of type {text.model_type} cannot be exported to gguf here, only"
            f" {', '.join(ARCHITECTURES)}; llama.cpp's convert_hf_to_gguf.py may know it"
        )
    return ARCHITECTURES[text.model_type]


def _add_shape(writer: Any, text: Any, bundle: Path) -> None:
    rope = text.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise InputError(
            f"{bundle}: positions of rope_type {rope['rope_type']} cannot be exported to gguf here, only default ones;"
            " llama.cpp's convert_hf_to_gguf.py knows others"
        )
    if len(set(getattr(text, "layer_types", None) or ["full_attention"]) | {"full_attention"}) > 1:
        raise InputError(f"{bundle}: layers with a sliding window cannot be exported to gguf here; --to stock can")
    heads, head_dim = text.num_attention_heads, getattr(text, "head_dim", None)
    head_dim = head_dim or text.hidden_size // heads
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)


def language_tensors(files: TensorFiles, text: Any) -> Iterator[tuple[str, Tensor]]:
    """The language model's tensors by transformers' names, rows of queries and keys in llama.cpp's order."""
    prefix = "language_model."
    for name in files:
        if not name.startswith(prefix) or (text.tie_word_embeddings and name.endswith("lm_head.weight")):
            continue
        value = files.read(name)
        if text.model_type == "llama":
            for part, heads in (("q_proj", text.num_attention_heads), ("k_proj", text.num_key_value_heads)):
                value = interleaved(value, heads) if f".{part}." in name else value
        yield name.removeprefix(prefix), value


def interleaved(value: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key matrix (or its bias) so that neighbours are rotated together, not halves of a head."""
    return value.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(value.shape)


def add_tensor(writer: Any, name: str, value: Tensor) -> None:
    """Add a tensor: matrices in their own dtype, vectors in fp32."""
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if value.ndim > 1 and value.dtype == torch.bfloat16:
        kind = GGMLQuantizationType.BF16
        writer.add_tensor(name, quantize(value.float().numpy(), kind), raw_dtype=kind)
    else:
        value = value if value.ndim > 1 and value.dtype == torch.float16 else value.float()
        writer.add_tensor(name, value.contiguous().numpy())


def write_out(writer: Any) -> None:
    """Write what was added, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def chat_template(template: str) -> str:
    """The bundle's chat template for llama.cpp, which puts text right behind an image's placeholder."""
    content, behind = "{{ message['content']", " \\n" if "'<image> '" in template else "\\n"
    return template.replace(content, f"{content} | replace('{MARKER_END}', '{MARKER_END}{behind}')")
