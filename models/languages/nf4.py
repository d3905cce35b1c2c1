"""Which layers bitsandbytes' NF4 can compute on every machine; the others stay whole.

A CPU with AVX512-BF16 puts a 4-bit weight into another order before it first answers with it
(`bitsandbytes.functional._convert_weight_packed_for_cpu`). A row must then be whole blocks, and 32 rows go together:
any other shape is an error there, and only there. A bundle must not depend on the machine that made it, so such layers
are quantized on none. Does not own bitsandbytes' settings (`models.languages.pretrained.quantization`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

BLOCK_INPUTS, ROWS_TOGETHER = 64, 32
"""Weights of one row that share a scale, and rows that are stored together: both of bitsandbytes."""


def fits(num_inputs: int, num_outputs: int) -> bool:
    """Whether a weight [num_outputs, num_inputs] can be computed in NF4 on every machine."""
    return num_inputs % BLOCK_INPUTS == 0 and num_outputs % ROWS_TOGETHER == 0


def layers_left_whole(model: nn.Module, kept: Iterable[str]) -> list[str]:
    """Full names of the linear layers that NF4 would quantize and that do not fit.

    Args:
        model: needs no weights.
        kept: patterns of transformers (`llm_int8_skip_modules`) of what is not quantized anyway.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    patterns = list(kept)
    return [
        name
        for name, module in model.named_modules()
        if (shape := _inputs_and_outputs(module)) and not fits(*shape) and should_convert_module(name, patterns)
    ]


def _inputs_and_outputs(module: nn.Module) -> tuple[int, int] | None:
    """Of a layer that transformers would make a quantized one; GPT-2's has its weight the other way round."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear:
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def told(names: list[str]) -> str:
    """One line that names such layers; equal ones of several decoder layers are named once, with their number."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    which = ", ".join(f"{name} ({count})" for name, count in counts.items())
    return (
        f"{len(names)} layers stay whole, since NF4 needs inputs in blocks of {BLOCK_INPUTS} "
        f"and outputs in blocks of {ROWS_TOGETHER}: {which}"
    )


def keep_order(model: nn.Module, *, only_what_does_not_fit: bool = False) -> None:
    """Let 4-bit layers compute from the order that is in the files, on every CPU.

    In the other order they compute in bf16 and give no gradient.
    """
    for module in model.modules():
        layer: Any = module
        if type(module).__name__ == "Linear4bit" and not (
            only_what_does_not_fit and fits(layer.in_features, layer.out_features)
        ):
            layer.support_avx512bf16_for_cpu = False
