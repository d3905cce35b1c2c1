"""A CLIP of the synthetic world as open_clip saves one: its architecture as JSON, and its weights under open_clip's
names.

    OUT/architecture.json                 for open_clip.add_model_config
    OUT/open_clip_model.safetensors       for open_clip.create_model(..., pretrained=FILE)

It has both towers, so that open_clip itself can open it. Writing it does not need open_clip.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.common.files import new_directory
from models.common.source import directory_of


def write_open_clip(clip: Path, out: Path) -> None:
    """Write the CLIP in Hugging Face's folder `clip` to `out`, which must hold nothing yet."""
    from safetensors.torch import save_file
    from transformers import CLIPModel

    model: Any = CLIPModel.from_pretrained(directory_of(str(clip)), trust_remote_code=False)
    with new_directory(out, replace=False) as folder:
        text = json.dumps(architecture(model.config), indent=1)
        (folder / "architecture.json").write_text(text + "\n", encoding="utf-8")
        save_file(renamed(model.state_dict()), folder / "open_clip_model.safetensors")


def architecture(config: Any) -> dict[str, Any]:
    """A CLIPConfig in open_clip's format."""
    seen, read = config.vision_config, config.text_config
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": seen.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": seen.image_size,
            "layers": seen.num_hidden_layers,
            "width": seen.hidden_size,
            "head_width": seen.hidden_size // seen.num_attention_heads,
            "patch_size": seen.patch_size,
            "mlp_ratio": seen.intermediate_size / seen.hidden_size,
        },
        "text_cfg": {
            "context_length": read.max_position_embeddings,
            "vocab_size": read.vocab_size,
            "width": read.hidden_size,
            "heads": read.num_attention_heads,
            "layers": read.num_hidden_layers,
            "mlp_ratio": read.intermediate_size / read.hidden_size,
        },
    }


_TOWERS = {"vision_model.": "visual.", "text_model.": ""}
_PARTS = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def renamed(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A CLIPModel's weights under open_clip's names: q, k and v joined, projections transposed."""
    import torch

    found: dict[str, Any] = {"logit_scale": weights["logit_scale"].reshape(())}
    found["visual.proj"] = weights["visual_projection.weight"].T.contiguous()
    found["text_projection"] = weights["text_projection.weight"].T.contiguous()
    for name, value in weights.items():
        tower = next((tower for tower in _TOWERS if name.startswith(tower)), None)
        if tower is None or name.endswith("position_ids") or ".k_proj." in name or ".v_proj." in name:
            continue
        joined = [value]
        if ".q_proj." in name:
            joined = [weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
        found[_TOWERS[tower] + _name(name.removeprefix(tower))] = torch.cat(joined)
    return found


def _name(name: str) -> str:
    renamed = name.replace("self_attn.q_proj.", "attn.in_proj_")
    for theirs, ours in _PARTS.items():
        renamed = renamed.replace(theirs, ours)
    return renamed
