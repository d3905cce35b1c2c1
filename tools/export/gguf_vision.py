"""A bundle's vision tower and projector as the GGUF that llama.cpp calls mmproj, by the library `gguf`.

    vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight --> v.blk.0.attn_q.weight
    multi_modal_projector.linear_1 / linear_2                          --> mm.0 / mm.2, with GELU between

llama.cpp's LLaVA graph (tools/mtmd/models/llava.cpp) appends the class token behind the patches, gives patch i
position i and hands on rows 1 to N: with a class token each patch has its neighbour's position, the first patch is lost
and the class token stands for the last. So only towers without one are computed right: SigLIP. It runs the layers up to
the feature layer, which are all that is written, and pads pictures to a square with one colour.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.documents import read_json
from models.common.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from models.common.sharded import TensorFiles

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_OUTER = {
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
}
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new")
PAD_COLOUR = (122, 116, 104)
"""What llama.cpp pads with, whatever the mean."""


def check_vision(config: Any, bundle: Path) -> None:
    """Raise InputError for a tower, a projector or pictures that llama.cpp would compute otherwise."""
    vision = config.vision_config
    refusal = f"{bundle}: {vision.model_type} cannot be exported to gguf"
    if vision.model_type not in ("siglip_vision_model", "siglip"):
        raise InputError(
            f"{refusal}: llama.cpp's LLaVA graph puts a class token behind the patches and drops the first one; a model"
            " with a SigLIP tower can be, and --to stock writes this one for other programs"
        )
    if vision.hidden_act not in _GELU_TANH:
        raise InputError(f"{refusal}: llama.cpp computes GELU by tanh, its activation is {vision.hidden_act}")
    if vision.intermediate_size == vision.hidden_size:
        raise InputError(f"{refusal}: llama.cpp takes layers as wide inside as outside for ones with swapped names")
    if config.model_type != "llava":
        raise InputError(f"{refusal}: its pictures are tiled (AnyRes), which llama.cpp tiles otherwise; --to stock can")


def write_vision(bundle: Path, file: Path, config: Any, name: str) -> int:
    """Write tower and projector; returns the number of tensors.

    Raises:
        InputError: llama.cpp would compute them otherwise.
    """
    from gguf import GGUFWriter

    from models.common.sharded import TensorFiles
    from tools.export.gguf_language import add_tensor, write_out

    check_vision(config, bundle)
    vision, layers = config.vision_config, num_layers(config)
    processor = read_json(bundle, "processor_config.json")["image_processor"]
    writer = GGUFWriter(str(file), "clip", use_temp_file=True)
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_use_gelu(True)
    scale = 255 * processor["rescale_factor"]  # 1, but for the pictures that are padded with black
    writer.add_vision_image_mean([value / scale for value in processor["image_mean"]])
    writer.add_vision_image_std([value / scale for value in processor["image_std"]])
    writer.add_array("clip.vision.feature_layer", [layers])
    num = 0
    for in_file, value in vision_tensors(TensorFiles.open(bundle), config, layers):
        add_tensor(writer, in_file, value)
        num += 1
    write_out(writer)
    return num


def num_layers(config: Any) -> int:
    """Layers of the tower up to `vision_feature_layer`, which counts from the embedding or from the end."""
    layer = int(config.vision_feature_layer)
    return layer if layer >= 0 else int(config.vision_config.num_hidden_layers) + 1 + layer


def vision_tensors(files: TensorFiles, config: Any, layers: int) -> Iterator[tuple[str, Tensor]]:
    """Tower and projector in llama.cpp's names, in fp32; layers behind the feature layer are left out.

    Raises:
        InputError: a linear projector is too wide to be a pair.
    """
    from tools.export.published import PROJECTOR, projector_pair, stock_tensors

    pair = projector_pair(files, config)
    if config.projector_hidden_act != "gelu" and pair is None:
        raise InputError(
            f"{files.directory}: its projector of one layer cannot be exported to gguf, since llama.cpp has GELU behind"
            " it and the language model is too narrow for a pair; `sightline.load` opens it"
        )
    for name, value in stock_tensors(files, pair):
        part, _, rest = name.partition(".")
        if part == PROJECTOR:
            module, _, leaf = rest.partition(".")
            yield f"mm.{ {'linear_1': 0, 'linear_2': 2}[module] }.{leaf}", value.float()
        elif part == "vision_tower":
            rest = rest.removeprefix("vision_model.")
            found = _LAYER.fullmatch(rest)
            if found and int(found[1]) < layers:
                yield f"v.blk.{found[1]}.{_INNER[found[2]]}.{found[3]}", value.float()
            elif rest in _OUTER:
                yield _OUTER[rest], value.float()
