"""PyTorch's own count of a run's matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
}
"""Counted since torch 2.14, causal or not over all pairs; left out here, as before."""


class ProductCounter(TorchDispatchMode):
    """FlopCounterMode's formulas without its tracking of modules, which cannot run a backward over frozen leaves.

    PyTorch's own attention on a CPU is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry and packet not in ATTENTION:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result
