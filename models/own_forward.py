"""A decoder whose layers are not known here, over packed samples: its class's own forward with our attention function.

    embedded [1, N, D] -> the class's own layers, attention with `segments` -> its own norm -> [N, D] or [K, D]

Exact where every layer attends through transformers' attention interface and hands on the arguments that it does not
know. What does not is refused when it is loaded (`models.packing_probe`). Without the savings of `models.decoder`: the
last layer runs everywhere, and norms keep what transformers' keep. N tokens of all samples, K wanted positions, D the
width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import packed_forward, register
from models.common.errors import InputError


class OwnForward:
    """Has the interface of `models.decoder.PackedDecoder`. Holds no weights: those are the model's."""

    def __init__(self, language: Any) -> None:
        self._decoder = language.get_decoder()
        language.set_attn_implementation(register())
        self._name = type(language).__name__
        self.num_calls = 0
        """How often attention was called with the samples' boundaries in the last forward."""

    @property
    def num_layers(self) -> int:
        """All decoder layers."""
        return len(layers_of(self._decoder))

    def recompute(self, num_layers: int) -> None:
        """Keep only the input of `num_layers` layers, evenly spread; the backward pass recomputes them.

        Raises InputError where the class's layers cannot.
        """
        num_layers = min(num_layers, self.num_layers)
        chosen = {place * self.num_layers // num_layers for place in range(num_layers)}
        layers: Any = layers_of(self._decoder)
        for place, layer in enumerate(layers):
            if chosen and not hasattr(layer, "gradient_checkpointing"):
                raise InputError(f"engine.activation_checkpointing: {self._name} has none; set it to false")
            layer.gradient_checkpointing = place in chosen
            layer._gradient_checkpointing_func = _recomputed

    def compile(self, backend: str = "inductor") -> None:
        """Raises InputError: only the layers that are known here are compiled."""
        del backend
        raise InputError(f"engine.compile: true, but {self._name} runs its own forward; set it to false")

    def __call__(self, embedded_ND: Tensor, packed: Any) -> Tensor:
        """Normed hidden states: [K, D] at the wanted positions, [N, D] everywhere."""
        with packed_forward() as attention:
            output = self._decoder(
                inputs_embeds=embedded_ND.unsqueeze(0),
                position_ids=packed.position_ids_N.unsqueeze(0),
                attention_mask=_no_mask(embedded_ND),
                segments=packed.segments,
                use_cache=False,
            )
            self.num_calls = attention.num_calls
        hidden_ND: Tensor = output.last_hidden_state.squeeze(0)
        return hidden_ND if packed.wanted_K is None else hidden_ND.index_select(0, packed.wanted_K)


def layers_of(decoder: Any) -> nn.ModuleList:
    """The decoder's layers. Raises InputError where they are not in one list."""
    total = int(decoder.config.num_hidden_layers)
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == total:
            return child
    raise InputError(f"model.language: the layers of {type(decoder).__name__} are not in one list, so none is trained")


def _recomputed(run: Any, *arguments: Any) -> Any:
    return checkpoint(run, *arguments, use_reentrant=False)


def _no_mask(embedded_ND: Tensor) -> Tensor:
    """Four dimensions: transformers takes such a mask as it is and makes none of N x N; `attend` does not look."""
    return embedded_ND.new_zeros(1, 1, 1, 1)
