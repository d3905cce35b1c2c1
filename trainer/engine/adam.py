"""The optimizer that DeepSpeed wraps: torch's AdamW, by its fused kernels where there is a GPU.

Fused, a step is one pass over weights, gradient and moments. On a CPU it rounds otherwise than the plain loop, so what
trains on a CPU keeps that. Where there is a GPU and the optimizer is offloaded, the weights that it updates lie in the
host's memory, and torch's fused kernel for the CPU runs there: on 2 cores and 30 million weights 0.118 s a step, the
plain loop 0.906 s. DeepSpeedCPUAdam is not used: it is compiled when a run starts (a compiler, ninja, a minute on every
node, and a lock file on which every later start hangs where a build was killed), and it counts steps in another type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.config.schema import AdamW
from trainer.engine.tuning import ParameterGroup

FUSED_DEVICES = {"cuda"}
"""Kinds of devices on which a model learns by the fused kernels."""


def build_adam(groups: Sequence[ParameterGroup], optimizer: AdamW, device: str) -> torch.optim.AdamW:
    """AdamW over the groups' parameters, with a learning rate of 0 until the engine sets one.

    With another rate here, forgetting to set it would train wrongly; so it changes nothing.

    Args:
        device: the kind of device that the model is on, `cuda` or `cpu`.
    """
    return torch.optim.AdamW(
        [{"params": list(group.parameters), "weight_decay": group.weight_decay} for group in groups],
        lr=0.0,
        betas=optimizer.betas,
        eps=optimizer.epsilon,
        fused=True if device in FUSED_DEVICES else None,
    )


def step_count(adam: torch.optim.AdamW, flat: Tensor, num_updates: int) -> Tensor:
    """A buffer's number of updates as AdamW keeps it: the fused kernel reads it where the buffer is."""
    return torch.tensor(float(num_updates), device=flat.device if adam.defaults["fused"] else "cpu")
