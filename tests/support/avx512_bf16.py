"""Lets bitsandbytes take this CPU for one with AVX512-BF16, or for one without.

On such a CPU 4-bit weights are put into another order before they are computed with
(`functional._convert_weight_packed_for_cpu`, which runs anywhere), by a kernel that needs the instructions. Where they
are missing, `_multiply` stands for the kernel. The file imports nothing of this project: `tests.support.environments`
copies it into environments, where a `.pth` file lets it act in every process that has the variable.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

VARIABLE = "TESTS_AVX512_BF16"
"""`on` or `off`, for every process of an environment that `tests.support.environments` has made."""


def set_flag(is_on: bool, put: Any = setattr) -> None:
    """From here on; `put` is setattr, or pytest's own, which is undone."""
    import bitsandbytes.functional as functional
    import bitsandbytes.nn.modules as modules

    if is_on and not functional.has_avx512bf16():
        put(functional, "gemv_4bit", _multiply)
    for module in (functional, modules):
        put(module, "has_avx512bf16", lambda: is_on)


def _multiply(A: Any, B: Any, out: Any = None, state: Any = None) -> Any:
    """What the kernel computes, in torch: inputs, scales and weights in bf16, sums in fp32."""
    import torch

    assert out is None
    assert state.packing_format_for_cpu
    num_outputs, num_inputs = state.shape
    bytes_32 = B.reshape(-1, 32)
    digits = torch.cat([bytes_32 & 0xF, bytes_32 >> 4], dim=1).reshape(num_outputs // 32, num_inputs // 2, 32, 2)
    digits = digits.transpose(-3, -2).reshape(num_outputs, num_inputs)
    scales = state.absmax.T.float().repeat_interleave(state.blocksize, dim=1)
    weight = (state.code[digits.long()] * scales).to(torch.bfloat16)
    return torch.nn.functional.linear(A.to(torch.bfloat16).float(), weight.float()).to(torch.bfloat16).to(A.dtype)


class _SetFlagOnImport(MetaPathFinder):
    """Sets the flag once bitsandbytes' layers are loaded. A `.pth` file that imported torch itself would hang."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "bitsandbytes.nn.modules":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        load = loader.exec_module

        def load_and_set(module: Any) -> None:
            load(module)
            set_flag({"on": True, "off": False}[os.environ[VARIABLE]])

        loader.exec_module = load_and_set
        return spec


if os.environ.get(VARIABLE):
    sys.meta_path.insert(0, _SetFlagOnImport())
