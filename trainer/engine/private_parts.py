"""The parts of DeepSpeed that are not public and that `engine` and `zero` read, looked for once an engine is built.

DeepSpeed changes them without notice. A missing one is an error before the first step, with the version and the name,
instead of an AttributeError inside one.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from models.common.errors import InputError

ENGINE = (
    "backward",
    "destroy",
    "is_gradient_accumulation_boundary",
    "module",
    "optimizer",
    "set_gradient_accumulation_boundary",
    "was_step_applied",
    "zero_grad",
)

OPTIMIZER: Mapping[int, tuple[str, ...]] = {
    0: ("param_groups",),
    1: ("averaged_gradients", "refresh_fp32_params", "single_partition_of_fp32_groups"),
    2: ("averaged_gradients", "refresh_fp32_params", "single_partition_of_fp32_groups"),
    3: (
        "averaged_gradients",
        "fp32_partitioned_groups_flat",
        "get_param_id",
        "grad_position",
        "parameter_offload",
        "refresh_fp32_params",
        "sub_group_to_group_id",
    ),
}
"""Attributes of the engine's optimizer, by ZeRO stage."""


def check_private_parts(engine: Any, zero_stage: int) -> None:
    """Look for everything that is read of an engine that DeepSpeed has just built.

    Raises:
        InputError: this version of DeepSpeed has it no longer.
    """
    missing = [f"{type(engine).__name__}.{name}" for name in ENGINE if not hasattr(engine, name)]
    optimizer = getattr(engine, "optimizer", None)
    missing += [f"{type(optimizer).__name__}.{name}" for name in OPTIMIZER[zero_stage] if not hasattr(optimizer, name)]
    if missing:
        raise InputError(
            f"DeepSpeed {metadata.version('deepspeed')} has no {', '.join(missing)}, which ZeRO stage {zero_stage} "
            "needs here; install a version from the range that `sightline versions` prints"
        )
