"""A causal language model trained from scratch, as a transformers model: it saves, loads, caches and generates.

    ids_BL -> embedding x sqrt(D) + sinusoids of the positions -> N x [norm, attention, norm, gated MLP] -> norm -> head

Vaswani et al. 2017 with the norms before the blocks, RMSNorm (Zhang and Sennrich 2019) and a gated SiLU MLP (Shazeer
2020); the head is the embedding. A layer has the modules and names of a Llama layer without rotary positions, so that
`decoder.PackedDecoder`, LoRA and quantization treat it as one. Positions are added inside the decoder, also to image
features. B rows, L positions, D width, H heads, d a head's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.attention import attend
from models.cache_argument import NAMES, cache_option, name, take_cache
from models.memory_efficient import MemoryEfficientMLP, MemoryEfficientRMSNorm

LONGEST_WAVE = 10000.0


class ScratchDecoderConfig(PreTrainedConfig):
    """Widths, layers and vocabulary; the names are those of Llama's configuration."""

    model_type = "sightline_decoder"

    vocab_size: int = 50258
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


class ScaledEmbedding(nn.Embedding):
    """Rows of unit length on average, times sqrt(D): the same magnitude as the sinusoids."""

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., D]."""
        return super().forward(ids) * self.embedding_dim**0.5


def writer(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer whose output is added to the residual stream; only its initialization differs."""
    linear = nn.Linear(inputs, outputs, bias=False)
    vars(linear)["writes"] = True
    return linear


def is_writer(linear: nn.Linear) -> bool:
    """Whether `writer` made it."""
    return bool(getattr(linear, "writes", False))


class Attention(nn.Module):
    """Causal attention of H heads without biases."""

    def __init__(self, config: ScratchDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj, self.k_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v_proj, self.o_proj = nn.Linear(width, width, bias=False), writer(width, width)

    def forward(self, states_BLD: Tensor, attention_mask: Tensor | None, cache: Any = None, **options: Any) -> Tensor:
        """[B, L, D] -> [B, L, D]; keys and values of earlier positions come from the cache, where there is one."""
        query, key, value = (
            project(states_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attend)
        attended_BLHd, _ = kernel(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **options,
        )
        projected: Tensor = self.o_proj(attended_BLHd.flatten(2))
        return projected


class ScratchDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: ScratchDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MemoryEfficientMLP(
            nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False), writer(inner, width)
        )
        self.input_layernorm = MemoryEfficientRMSNorm(nn.Parameter(torch.ones(width)), config.rms_norm_eps)
        self.post_attention_layernorm = MemoryEfficientRMSNorm(nn.Parameter(torch.ones(width)), config.rms_norm_eps)

    def forward(self, states_BLD: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        options.pop("position_embeddings", None)
        states_BLD = states_BLD + self.self_attn(self.input_layernorm(states_BLD), attention_mask, **options)
        finished: Tensor = states_BLD + self.mlp(self.post_attention_layernorm(states_BLD))
        return finished


class ScratchDecoderBase(PreTrainedModel):
    """Settings that transformers expects of both classes below."""

    config_class = ScratchDecoderConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ("ScratchDecoderLayer",)
    _skip_keys_device_placement = NAMES

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal, so that a layer keeps its input's size (LeCun); smaller for the 2 N layers of `writer`."""
        if isinstance(module, ScaledEmbedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.Linear):
            num_writers = 2 * self.config.num_hidden_layers if is_writer(module) else 1
            nn.init.normal_(module.weight, std=(module.in_features * num_writers) ** -0.5)


class ScratchDecoderModel(ScratchDecoderBase):
    """Embedding, layers and the last norm."""

    def __init__(self, config: ScratchDecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ScratchDecoderLayer(config, place) for place in range(config.num_hidden_layers))
        self.norm = MemoryEfficientRMSNorm(nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps)
        self.post_init()

    def add_positions(self, states_BLD: Tensor, position_ids_BL: Tensor) -> Tensor:
        """States with the sinusoids of their positions added; computed, so that there is no largest position."""
        return states_BLD + sinusoids(position_ids_BL, states_BLD.shape[-1]).to(states_BLD.dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """The last normed states [B, L, D]; arguments as of any decoder of transformers."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        states_BLD: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = take_cache(options)
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            num_seen = cache.get_seq_length() if cache is not None else 0
            position_ids = num_seen + torch.arange(states_BLD.shape[1], device=states_BLD.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=states_BLD,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_option(cache),
        )
        states_BLD = self.add_positions(states_BLD, position_ids)
        for layer in self.layers:
            states_BLD = layer(states_BLD, attention_mask=mask, cache=cache, **options)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states_BLD), **cache_option(cache))


class ScratchDecoderForCausalLM(ScratchDecoderBase, GenerationMixin):
    """The decoder and its head, whose matrix is the embedding's."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' own

    def __init__(self, config: ScratchDecoderConfig) -> None:
        super().__init__(config)
        self.model = ScratchDecoderModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, vocabulary], of the last `logits_to_keep` positions where that is not 0."""
        options.pop("return_dict", None)
        output = self.model(input_ids=input_ids, **options)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **cache_option(getattr(output, name())))


def sinusoids(position_ids: Tensor, width: int) -> Tensor:
    """sin and cos of positions at width / 2 wave lengths from 2 pi to 10,000 x 2 pi: [...] -> [..., width], fp32."""
    exponents = torch.arange(0, width, 2, device=position_ids.device, dtype=torch.float32) / width
    angles = position_ids.unsqueeze(-1).float() * LONGEST_WAVE**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


AutoConfig.register(ScratchDecoderConfig.model_type, ScratchDecoderConfig)
AutoModel.register(ScratchDecoderConfig, ScratchDecoderModel)
AutoModelForCausalLM.register(ScratchDecoderConfig, ScratchDecoderForCausalLM)
