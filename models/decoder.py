"""The decoder layers of a Llama, Qwen2 or Qwen3 of transformers, or of the scratch decoder, over packed samples.

    embedded [1, N, D] -> layer -> layer -> ... -> last layer, only where hidden states are wanted -> norm -> [K, D]

Owns which layers compute what, which are recomputed in the backward pass, and which are compiled. The layers are
transformers' own, with the norm and MLP of `models.memory_efficient` inside; LoRA adapters and quantized weights stay
in place.
N tokens of all samples, K wanted positions, L either, D the width, H heads, d a head's width, A = H d.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.attention import Segments, attend, keep_uncompiled, register
from models.common.errors import InputError
from models.memory_efficient import use_memory_efficient_layers
from models.own_forward import OwnForward, layers_of

LAYERS = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "ScratchDecoderLayer"}
)
"""The layers whose parts `_finish` knows: pre-norm, q, k, v and o projections, an MLP; rotary positions or none."""


Rotary = tuple[Tensor, ...]
"""(cos, sin) [1, N, d] of the positions, or nothing where a decoder has no rotary positions."""


@dataclass(frozen=True)
class Packed:
    """Samples one after another, without padding."""

    input_ids_N: Tensor
    position_ids_N: Tensor
    """From 0 in every sample."""
    image_I: Tensor
    """The indices of the image tokens in the N tokens."""
    segments: Segments
    wanted_K: Tensor | None = None
    """Where hidden states are wanted; None: everywhere."""
    rope_3N: Tensor | None = None
    """Positions by time, row and column, where a decoder has them (M-RoPE); None: `position_ids_N`."""
    deep: tuple[Tensor, ...] = ()
    """What is added at the image tokens after layer 0, 1, ..., each [I, D] (DeepStack)."""


class Runner(Protocol):
    """A decoder over packed samples."""

    @property
    def num_layers(self) -> int:
        """All decoder layers."""
        ...

    def recompute(self, num_layers: int) -> None:
        """Keep only the input of `num_layers` layers, evenly spread; the backward pass recomputes them."""
        ...

    def compile(self, backend: str = "inductor") -> None:
        """Compile each layer; raises InputError where that is not possible."""
        ...

    def __call__(self, embedded_ND: Tensor, packed: Packed) -> Tensor:
        """Normed hidden states: [K, D] at the wanted positions, [N, D] everywhere."""
        ...


def packed_decoder(language: Any) -> Runner:
    """With the short cuts below where the layers are known, else by the class's own forward."""
    return PackedDecoder(language) if is_known(language) else OwnForward(language)


def is_known(language: Any) -> bool:
    """Whether the layers of a causal language model are among LAYERS."""
    return type(layers_of(language.get_decoder())[0]).__name__ in LAYERS


def prepare(language: Any) -> Any:
    """Give a causal language model of transformers the packed attention and the memory-efficient modules, in place.

    It generates as before. Doing it twice changes nothing. Raises InputError for an architecture whose layers are not
    known here.
    """
    layers = language.get_decoder().layers
    if type(layers[0]).__name__ not in LAYERS:
        raise InputError(f"model.language: {type(layers[0]).__name__} is not one of {', '.join(sorted(LAYERS))}")
    language.set_attn_implementation(register())
    for layer in layers:
        use_memory_efficient_layers(layer, language.config.hidden_act)
    return language


class PackedDecoder:
    """Runs the decoder of a causal language model of transformers. Holds no weights: those are the model's."""

    def __init__(self, language: Any) -> None:
        self._decoder = prepare(language).get_decoder()
        self._recomputed: frozenset[int] = frozenset()
        self._finish = _finish
        self._is_compiled = False

    @property
    def num_layers(self) -> int:
        """All decoder layers."""
        return len(self._decoder.layers)

    def recompute(self, num_layers: int) -> None:
        """Keep only the input of `num_layers` layers, evenly spread; the backward pass recomputes them."""
        num_layers = min(num_layers, self.num_layers)
        self._recomputed = frozenset(place * self.num_layers // num_layers for place in range(num_layers))

    def compile(self, backend: str = "inductor") -> None:
        """Compile each layer with torch.compile; all layers share what is compiled for the first."""
        keep_uncompiled()
        for layer in self._decoder.layers:
            layer.compile(backend=backend)
        self._finish = torch.compile(_finish, backend=backend)
        self._is_compiled = True

    def __call__(self, embedded_ND: Tensor, packed: Packed) -> Tensor:
        """Normed hidden states: [K, D] at the wanted positions, [N, D] everywhere."""
        hidden_1ND, rotary = _place(self._decoder, embedded_ND.unsqueeze(0), packed)
        if self._is_compiled:
            _mark_as_varying(1, *rotary)
            _mark_as_varying(0, packed.segments.starts_G1, packed.wanted_K)
        layers = list(self._decoder.layers)
        num_whole = len(layers) if packed.wanted_K is None else len(layers) - 1
        for place in range(num_whole):
            hidden_1ND = self._call(place, _whole, layers[place], hidden_1ND, rotary, packed.segments)
            if place < len(packed.deep):
                hidden_1ND = hidden_1ND.index_add(1, packed.image_I, packed.deep[place].to(hidden_1ND.dtype)[None])
        if packed.wanted_K is not None:
            arguments = (layers[-1], hidden_1ND, rotary, packed.segments, packed.wanted_K)
            hidden_1ND = self._call(num_whole, self._finish, *arguments)
        normed_1ND: Tensor = self._decoder.norm(hidden_1ND)
        return normed_1ND.squeeze(0)

    def _call(self, place: int, run: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if self._is_compiled:
            _mark_as_varying(1, arguments[1])
        if place in self._recomputed and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(run, *arguments, use_reentrant=False)
            return recomputed
        return run(*arguments)


def _place(decoder: Any, embedded_1ND: Tensor, packed: Packed) -> tuple[Tensor, Rotary]:
    """The first layer's input, and (cos, sin) for all layers; our own decoder adds positions instead of rotating."""
    positions = packed.position_ids_N.unsqueeze(0)
    if hasattr(decoder, "rotary_emb"):
        if packed.rope_3N is not None:
            positions = packed.rope_3N.unsqueeze(1)
        return embedded_1ND, decoder.rotary_emb(embedded_1ND, positions)
    return decoder.add_positions(embedded_1ND, positions), ()


def _mark_as_varying(dimension: int, *tensors: Tensor | None) -> None:
    """Tell torch.compile that this size changes from batch to batch, before it treats it as a constant."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def _whole(layer: Any, hidden_1ND: Tensor, rotary: Rotary, segments: Segments) -> Tensor:
    """Run one decoder layer at every position, [1, N, D] -> [1, N, D]."""
    output: Any = layer(hidden_1ND, attention_mask=None, position_embeddings=rotary, segments=segments)
    return output


def _finish(layer: Any, hidden_1ND: Tensor, rotary: Rotary, segments: Segments, wanted_K: Tensor) -> Tensor:
    """The last layer, [1, N, D] -> [1, K, D]: keys and values everywhere, all else where states are wanted.

    Nothing after the last layer's attention looks at another position, so this is exact. The other queries are zeros,
    so that the attention call is the same as in every layer; their results are not used.
    """
    attention, normed_1ND = layer.self_attn, layer.input_layernorm(hidden_1ND)
    query = _heads(attention, "q", normed_1ND.index_select(1, wanted_K))
    query = _rotate(query, *(part.index_select(1, wanted_K) for part in rotary))
    everywhere = query.new_zeros(1, query.shape[1], hidden_1ND.shape[1], query.shape[3])
    attended, _ = attend(
        attention,
        everywhere.index_copy(2, wanted_K, query),
        _rotate(_heads(attention, "k", normed_1ND), *rotary),
        _heads(attention, "v", normed_1ND),
        None,
        scaling=attention.scaling,
        dropout=attention.attention_dropout if attention.training else 0.0,
        segments=segments,
        sliding_window=_window(attention),
    )
    attended_1KA = attended.index_select(1, wanted_K).flatten(2)
    residual_1KD = hidden_1ND.index_select(1, wanted_K) + attention.o_proj(attended_1KA)
    finished: Tensor = residual_1KD + layer.mlp(layer.post_attention_layernorm(residual_1KD))
    return finished


def _window(attention: Any) -> int | None:
    """How many positions a query sees; Mistral's layers read it from the configuration."""
    config = getattr(attention, "config", None)
    window: int | None = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return window


def _heads(attention: Any, name: str, normed_1LD: Tensor) -> Tensor:
    """The queries, keys or values [1, H, L, d] of normed states; Qwen3 norms queries and keys by head."""
    states_1LHd = getattr(attention, f"{name}_proj")(normed_1LD).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    heads_1HLd: Tensor = (states_1LHd if norm is None else norm(states_1LHd)).transpose(1, 2)
    return heads_1HLd


def _rotate(states_1HLd: Tensor, *rotary: Tensor) -> Tensor:
    """Rotary position embedding, on halves of each head, as in transformers' Llama; unchanged where there is none."""
    if not rotary:
        return states_1HLd
    cos_1Ld, sin_1Ld = rotary
    first, second = states_1HLd.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return states_1HLd * cos_1Ld.unsqueeze(1) + turned * sin_1Ld.unsqueeze(1)
