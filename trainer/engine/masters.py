"""Full fine-tuning in bf16: the forward's weights are bf16, the masters that Adam updates fp32 and divided over ranks.

    exact fp32 weights --narrow--> bf16 parameters --DeepSpeed--> gathered and reduced as bf16
            '--what bf16 cannot hold--> Engine.set_masters --> fp32 masters, this rank's slices --> checkpoints

The usual mixed precision (Micikevicius et al. 2018, section 3.1). Against fp32 parameters under autocast it halves the
bytes on the wire; ZeRO-2 holds 2 bytes a weight and its share of 12, instead of 4 and its share, and autocast's casts.
Micro-batches' gradients are added up in fp32. Adapters and projectors stay fp32: they are small, and their first steps
are as large as the weights. Under ZeRO-0 nothing holds masters apart from the parameters, so those stay fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.placement import cast, local_slice
from trainer.config.schema import StageConfig
from trainer.config.tuning import Full
from trainer.engine.tuning import ParameterGroup


def has_masters(config: StageConfig) -> bool:
    """Whether a stage's trained weights are bf16 with fp32 masters: the language model is tuned in full, in bf16."""
    engine = config.engine
    return isinstance(config.tune.language, Full) and engine.precision == "bf16" and engine.zero != "zero0"


@dataclass(frozen=True)
class Exact:
    """fp32 elements of a flattened weight from `start` on: all of it, or this rank's share of a divided one."""

    start: int
    values: Tensor


def narrow(groups: Sequence[ParameterGroup]) -> dict[str, Exact]:
    """Make trained weights bf16, in place.

    Returns:
        By name the exact weights, fp32, of those that bf16 does not hold: none of a model that was published in bf16.
    """
    exact: dict[str, Exact] = {}
    for group in groups:
        for name, parameter in zip(group.names, group.parameters, strict=True):
            start, weight = local_slice(parameter)
            cast(parameter, torch.bfloat16)
            if not torch.equal(local_slice(parameter)[1].to(weight.dtype), weight):
                exact[name] = Exact(start, weight)
    return exact


def filler(exact: Mapping[str, Exact]) -> Callable[[str, Sequence[tuple[str, int, Tensor]]], None]:
    """What fills slices of weights from exact ones, as a checkpoint's reader does."""

    def fill(_: str, targets: Sequence[tuple[str, int, Tensor]]) -> None:
        for name, start, values in targets:
            found = exact[name]
            values.copy_(found.values[start - found.start :][: values.numel()])

    return fill
