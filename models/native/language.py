"""The language models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: Qwen2 and Qwen3 with positions by time, row and column.

    position ids [B, L]     text alone: what Qwen2 and Qwen3 compute
    position ids [3, B, L]  M-RoPE: each pair of a head's dimensions turns by one of the three

Layers, names of weights and cache are those of transformers' Qwen2 and Qwen3, so that all short cuts know them. Only
the rotary module is another, the published model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

_MROPE = {"mrope_section", "mrope_interleaved"}


class MropeQwen2Config(Qwen2Config):
    """Qwen2's, with the sections of M-RoPE in `rope_parameters`."""

    model_type = "sightline_mrope_qwen2"
    ignore_keys_at_rope_validation = _MROPE


class MropeQwen3Config(Qwen3Config):
    """Qwen3's, with the sections of M-RoPE in `rope_parameters`."""

    model_type = "sightline_mrope_qwen3"
    ignore_keys_at_rope_validation = _MROPE


Deep = tuple[Tensor, tuple[Tensor, ...]]
"""Places [I] of the image tokens in the B L positions, and what is added there after layer 0, 1, ..., each [I, D]."""


class _HeldRotary:
    """A rotary module that takes the positions of a whole forward by time, row and column, where it has been given any.

    The decoder's own forward makes masks of its positions, which must count tokens.
    """

    held: Tensor | None = None

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) [B, L, d] of position ids [B, L] or [3, B, L]."""
        found: Any = super().forward(states, position_ids if self.held is None else self.held)  # type: ignore[misc]
        return found[0], found[1]


class _HeldRotaryEmbedding2(_HeldRotary, Qwen2_5_VLRotaryEmbedding):
    """Of Qwen2-VL and Qwen2.5-VL."""


class _HeldRotaryEmbedding3(_HeldRotary, Qwen3VLTextRotaryEmbedding):
    """Of Qwen3-VL."""


class _MropeModel:
    """A decoder of transformers that also takes positions [3, B, L], and features for its first layers."""

    layers: Any
    rotary_emb: Any

    def forward(
        self, *arguments: Any, position_ids: Tensor | None = None, deep: Deep | None = None, **options: Any
    ) -> Any:
        """As transformers' own forward."""
        is_by_place = position_ids is not None and position_ids.ndim == 3
        self.rotary_emb.held = position_ids if is_by_place else None
        image_I, levels = deep if deep is not None else (None, ())
        handles = [
            layer.register_forward_hook(_adding(image_I, features_ID))
            for layer, features_ID in zip(self.layers, levels, strict=False)
        ]
        try:
            positions = None if is_by_place else position_ids
            return super().forward(*arguments, position_ids=positions, **options)  # type: ignore[misc]
        finally:
            self.rotary_emb.held = None
            for handle in handles:
                handle.remove()


def _adding(image_I: Any, features_ID: Tensor) -> Any:
    def add(_layer: Any, _inputs: Any, states_BLD: Tensor) -> Tensor:
        added: Tensor = states_BLD.flatten(0, 1).index_add(0, image_I, features_ID.to(states_BLD.dtype))
        return added.view_as(states_BLD)

    return add


class _MropeQwen2Model(_MropeModel, Qwen2Model):
    config_class = MropeQwen2Config


class _MropeQwen3Model(_MropeModel, Qwen3Model):
    config_class = MropeQwen3Config


class MropeQwen2ForCausalLM(Qwen2ForCausalLM):
    """The language model of Qwen2-VL and Qwen2.5-VL."""

    config_class = MropeQwen2Config

    def __init__(self, config: MropeQwen2Config) -> None:
        super().__init__(config)
        self.model = _MropeQwen2Model(config)
        self.model.rotary_emb = _HeldRotaryEmbedding2(config)
        self.post_init()


class MropeQwen3ForCausalLM(Qwen3ForCausalLM):
    """The language model of Qwen3-VL; what its tower adds after the first layers comes from outside."""

    config_class = MropeQwen3Config

    def __init__(self, config: MropeQwen3Config) -> None:
        super().__init__(config)
        self.model = _MropeQwen3Model(config)
        self.model.rotary_emb = _HeldRotaryEmbedding3(config)
        self.post_init()


_CONFIGS: Mapping[str, Any] = {
    "qwen2_vl_text": MropeQwen2Config,
    "qwen2_5_vl_text": MropeQwen2Config,
    "qwen3_vl_text": MropeQwen3Config,
}
"""`model_type` of a published text configuration -> ours."""

_OF_OTHERS = ("model_type", "architectures", "transformers_version", "_name_or_path")


def language_config(text: Any) -> Any:
    """The configuration of the language model alone, from the text part of a published VLM's."""
    values = {name: value for name, value in text.to_dict().items() if name not in _OF_OTHERS}
    return _CONFIGS[text.model_type](**values)


for config_class, model_class in (
    (MropeQwen2Config, MropeQwen2ForCausalLM),
    (MropeQwen3Config, MropeQwen3ForCausalLM),
):
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
