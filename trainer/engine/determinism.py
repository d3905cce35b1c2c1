"""The same bits in every run on GPUs of the same kind and number: what torch, cuBLAS and attention need for it.

Without this, kernels that add in the order in which threads come (flash attention's backward, the gradient of an
embedding, cuBLAS with several workspaces) change the last bits of a gradient from run to run. On a CPU nothing does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""cuBLAS is deterministic where each stream has workspaces of its own
(https://docs.nvidia.com/cuda/cublas/#results-reproducibility); torch refuses its calls where this is not set."""


def set_workspace(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give cuBLAS workspaces with which it is deterministic. Has an effect only before its first call in a process."""
    if environment.get(WORKSPACE) not in (":4096:8", ":16:8"):
        environment[WORKSPACE] = ":4096:8"


def set_determinism(is_wanted: bool) -> None:
    """Let this process compute deterministically, or as fast as it can.

    Strictly: an operation that has no deterministic kernel is an error, and flash attention's backward, which torch
    only warns of otherwise, is the deterministic one (aten/native/transformers/cuda/attention_backward.cu).
    """
    if is_wanted:
        set_workspace()
    torch.use_deterministic_algorithms(is_wanted, warn_only=False)
    # In this mode torch fills what `torch.empty` gives with NaN; the padding of ZeRO's slices is never written, and
    # would make every norm NaN.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    if is_wanted or "torch._inductor" in sys.modules:  # its import takes 1 to 2 CPU seconds
        from torch._inductor import config

        if hasattr(config, "deterministic"):  # compiled layers: no choice of kernels by their time, torch 2.10
            config.deterministic = is_wanted
