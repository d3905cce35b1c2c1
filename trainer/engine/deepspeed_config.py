"""DeepSpeed's configuration for a stage: the file that `engine.zero` names, and what the recipe decides.

Knows DeepSpeed's keys, but does not import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from models.common.documents import read_json
from models.common.errors import InputError
from trainer.config.schema import DS_CONFIGS, EngineConfig

NUMERICS: dict[str, Any] = {
    "gradient_predivide_factor": 1.0,
    "prescale_gradients": False,
    "gradient_allreduce_op": "mean",
    "communication_data_type": "fp32",
    "fp16": {"enabled": False},
    "bf16": {"enabled": False},
    "torch_autocast": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
}
"""Every DeepSpeed setting that affects numbers, so that a changed default of DeepSpeed changes no run."""

TIMERS: dict[str, Any] = {"throughput": {"enabled": False, "synchronized": False}}
"""Its throughput timer would wait for the device twice a micro-batch; `trainer.tracking.throughput` has a clock."""

WIRE = {torch.float32: "fp32", torch.bfloat16: "bf16"}
"""DeepSpeed's names of what gradients are sent as."""

GRADIENT_BYTES = 4
"""Of a weight's gradient where micro-batches are added up: fp32."""

REDUCED_ONCE_BYTES = 4e9
"""Gradients up to this size are kept whole while micro-batches are added up, and reduced once a step, as ZeRO-1 does.

ZeRO-2 reduces in every micro-batch, so that a rank keeps its share of them alone. That of 160 million adapters' weights
on 8 ranks would save 0.56 GB, and send 0.64 GB for every micro-batch.
"""

OFFLOADS = ("offload_optimizer", "offload_param")


def deepspeed_config(
    config: EngineConfig,
    *,
    clip_norm: float | None,
    micro_rows: int,
    num_micro_batches: int,
    world_size: int,
    device: str = "cpu",
    reduced_as: torch.dtype = torch.float32,
    num_trained: int = 0,
) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` gets (https://www.deepspeed.ai/docs/config-json/).

    Args:
        clip_norm: the largest gradient norm; None: gradients are not clipped.
        micro_rows: rows of one micro-batch on one rank.
        num_micro_batches: micro-batches of one step on one rank.
        device: the kind of device that the model is on. Beside a GPU offloaded buffers are pinned, so that copies to
            and from it need no staging and run beside its computation.
        reduced_as: the dtype of gradients on the wire, that of the trained parameters.
        num_trained: trained weights, which decide how often ZeRO-2 reduces.

    Raises:
        InputError: the file sets clipping or precision itself, which the recipe decides.
    """
    file = DS_CONFIGS / f"{config.zero}.json"
    settings = read_json(DS_CONFIGS, file.name)
    # DeepSpeed clips to 1.0 by default, since https://github.com/deepspeedai/DeepSpeed/pull/8068. The engine has
    # already clipped to this norm; with the same value DeepSpeed divides by (norm + 1e-6) / norm once more.
    decided = {"gradient_clipping": clip_norm or 0.0, **NUMERICS, "communication_data_type": WIRE[reduced_as]}
    for name, value in decided.items():
        if settings.setdefault(name, value) != value:
            raise InputError(
                f"{file}: {name} is {settings[name]!r}; the recipe sets clipping and precision, leave it out"
            )
    settings["timers"] = TIMERS
    zero = settings["zero_optimization"]
    zero["stage"] = zero_stage(zero, num_micro_batches, num_trained)
    if num_trained and "reduce_bucket_size" in zero:  # a buffer of this size is allocated, however little learns
        zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], num_trained)
    for offload in OFFLOADS:
        if offload in zero:
            zero[offload]["pin_memory"] = device == "cuda"
    settings["train_micro_batch_size_per_gpu"] = micro_rows
    settings["gradient_accumulation_steps"] = num_micro_batches
    settings["train_batch_size"] = micro_rows * num_micro_batches * world_size
    return settings


def zero_stage(settings: Mapping[str, Any], num_micro_batches: int, num_trained: int) -> int:
    """The ZeRO stage that a stage runs with: 1 instead of 2 where that reduces less often and memory allows it.

    Args:
        settings: the file's `zero_optimization`. What offloads the optimizer keeps its gradients on the host anyway.
    """
    stage = int(settings["stage"])
    fits = GRADIENT_BYTES * num_trained <= REDUCED_ONCE_BYTES
    return 1 if stage == 2 and "offload_optimizer" not in settings and num_micro_batches > 1 and fits else stage
