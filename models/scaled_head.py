"""The output head of a language model, with what its class does to logits: Granite's, Cohere's and Gemma's scaling.

`get_output_embeddings()` is the matrix alone. Where a class scales its logits, losses and comparisons without that
would be others than its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

SCALES = ("logits_scaling", "logit_scale", "final_logit_softcapping")
"""Values of a configuration that change logits: divided by (Granite), multiplied by (Cohere), capped at (Gemma)."""


class ScaledHead:
    """A head that scales its logits; the matrix stays the language model's. Has what the chunked loss asks for."""

    def __init__(self, matrix: Any, config: Any) -> None:
        self._matrix, self._config = matrix, config
        self.out_features = int(matrix.out_features)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the matrix."""
        parameters: Iterator[nn.Parameter] = self._matrix.parameters()
        return parameters

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., D]."""
        return scaled(self._matrix(hidden), self._config)


def is_scaled(config: Any) -> bool:
    """Whether a language model's configuration says that its logits are not the matrix's alone."""
    return any(getattr(config, name, None) not in (None, 1, 1.0) for name in SCALES)


def scaled(logits: Tensor, config: Any) -> Tensor:
    """The logits of a class with this configuration, from the matrix's."""
    divisor, factor, cap = (getattr(config, name, None) for name in SCALES)
    if divisor is not None:
        logits = logits / divisor
    if factor is not None:
        logits = logits * factor
    return logits if cap is None else cap * torch.tanh(logits / cap)


def output_head(language: Any) -> Any:
    """What gives a causal language model's logits [..., vocabulary] for hidden states [..., D]."""
    matrix, config = language.get_output_embeddings(), language.config.get_text_config()
    return ScaledHead(matrix, config) if is_scaled(config) else matrix
