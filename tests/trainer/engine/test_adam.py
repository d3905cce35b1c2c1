"""The optimizer: fused where a GPU trains, under every ZeRO stage; DeepSpeed's timers never wait for the device."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from tests.support.ranks import run_on_ranks
from tests.trainer.engine.test_zero import ZEROS, accumulate, build, check_backends
from trainer.config.schema import AdamW, EngineConfig
from trainer.distributed.context import DistributedContext
from trainer.engine import adam
from trainer.engine.adam import build_adam, step_count
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.process_group import leave_distributed, start_distributed
from trainer.engine.tuning import ParameterGroup


@pytest.mark.parametrize(("device", "is_fused"), [("cuda", True), ("cpu", None)])
def test_a_gpu_steps_by_the_fused_kernels(device: str, is_fused: bool | None) -> None:
    weight = nn.Parameter(torch.ones(3))
    built = build_adam([ParameterGroup("projector", ("a",), (weight,), 1e-3, 0.1)], AdamW(), device)
    assert built.defaults["fused"] is is_fused
    (group,) = built.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.0, 0.1)


def test_the_fused_kernel_gets_its_count_where_its_buffer_is() -> None:
    flat = torch.zeros(2, device="meta")
    for device, place in (("cuda", "meta"), ("cpu", "cpu")):
        group = ParameterGroup("projector", ("a",), (nn.Parameter(torch.ones(3)),), 1e-3, 0.0)
        assert step_count(build_adam([group], AdamW(), device), flat, 3).device.type == place


def fused_backends(ranks: DistributedContext) -> None:
    with patch.object(adam, "FUSED_DEVICES", {"cpu"}):
        check_backends(ranks, ZEROS)


@pytest.mark.slow
def test_every_zero_stage_steps_and_restores_with_the_fused_kernel() -> None:
    """torch's fused AdamW exists for CPUs too: that of offloaded stages beside a GPU."""
    run_on_ranks(2, fused_backends)


@pytest.mark.parametrize("zero", ["zero2_offload", "zero3_offload"])
def test_offloaded_buffers_are_pinned_beside_a_gpu(zero: str) -> None:
    def pinned(device: str) -> set[bool]:
        settings = deepspeed_config(
            EngineConfig.model_validate({"zero": zero}),
            clip_norm=None,
            micro_rows=1,
            num_micro_batches=1,
            world_size=1,
            device=device,
        )["zero_optimization"]
        return {value["pin_memory"] for key, value in settings.items() if key.startswith("offload_")}

    assert pinned("cuda") == {True}
    assert pinned("cpu") == {False}


def device_waits(ranks: DistributedContext, zeros: tuple[str, ...]) -> dict[str, int]:
    """Calls of DeepSpeed's `synchronize` in the steps after its timers have warmed up, which takes two."""
    from deepspeed.accelerator import get_accelerator

    start_distributed(ranks, 60.0)
    found: dict[str, int] = {}
    plain = type(get_accelerator()).synchronize
    for zero in zeros:
        engine = build(ranks, zero)
        num = 0

        def counted(*given: Any, **options: Any) -> Any:
            nonlocal num
            num += 1
            return plain(*given, **options)

        for step in range(4):
            with patch.object(type(get_accelerator()), "synchronize", counted):
                accumulate(engine)
                engine.step(0.1, 1.0)
            num = num if step >= 2 else 0
        found[zero] = num
        engine.close()
    leave_distributed()
    return found


@pytest.mark.slow
def test_deepspeed_waits_for_the_device_in_no_step() -> None:
    """Its throughput timer, on by default, waited 8 times in a step of four micro-batches."""
    assert run_on_ranks(1, device_waits, ("zero0", "zero1", "zero2", "zero3"))[0] == dict.fromkeys(
        ("zero0", "zero1", "zero2", "zero3"), 0
    )
