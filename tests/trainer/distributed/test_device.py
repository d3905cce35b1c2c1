"""A GPU that is announced is used or the start ends; one visible GPU is enough; ranks' devices are of one kind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from models.attention import ONE_BY_ONE, Segments, choose_kernel
from models.common.errors import InputError
from trainer.distributed.context import DistributedContext
from trainer.distributed.device import (
    DeviceFacts,
    announced,
    as_record,
    check_precision,
    choose_device,
    describe,
    exchange,
    fault_of,
    numbers,
    set_allocator,
    summary,
)
from trainer.distributed.ports import choose_port

H100 = DeviceFacts(0, "node1", "cuda:0", "NVIDIA H100 80GB HBM3", 85_000_000_000, (9, 0), "GPU-a")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch see so many GPUs of a compute capability."""

    def see(number: int, capability: tuple[int, int] = (9, 0)) -> None:
        properties = SimpleNamespace(
            name="NVIDIA H100 80GB HBM3", total_memory=85 * 10**9, major=capability[0], minor=capability[1], uuid="u"
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return see


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_GPUS_ON_NODE": "0"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "8"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ""),
        ({}, ""),
    ],
)
def test_gpus_that_cannot_be_used_are_wrong_input_where_they_are_announced(
    environment: dict[str, str], said: str, gpus: Any
) -> None:
    gpus(0)
    assert announced(environment) == said
    assert choose_device(0, {**environment, "DS_ACCELERATOR": "cpu"}) == torch.device("cpu")
    if not said:
        assert choose_device(0, environment) == torch.device("cpu")
        return
    with pytest.raises(InputError) as error:
        choose_device(0, environment)
    assert said in str(error.value)
    assert torch.__version__ in str(error.value)
    assert "driver" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_rank_has_its_own_gpu_or_the_only_one_that_it_sees(gpus: Any) -> None:
    gpus(8)
    assert choose_device(5, {}) == torch.device("cuda", 5)
    gpus(1)
    assert choose_device(5, {"CUDA_VISIBLE_DEVICES": "5"}) == torch.device("cuda", 0)
    gpus(4)
    with pytest.raises(InputError, match="local rank 5, but 4 GPUs are visible"):
        choose_device(5, {})


def test_devices_of_two_kinds_and_a_shared_one_are_said_by_rank_and_machine() -> None:
    eight = [replace(H100, rank=rank, uuid=f"GPU-{rank}") for rank in range(8)]
    assert not fault_of(eight)
    assert summary(eight) == "ranks 0-7 on node1: NVIDIA H100 80GB HBM3 (85 GB, compute capability 9.0)"
    on_cpu = replace(H100, rank=5, host="node2", device="cpu", name="cpu", memory_bytes=0, capability=None, uuid="")
    told = fault_of([*eight[:5], on_cpu, *eight[6:]])
    assert "NVIDIA H100 80GB HBM3 (85 GB, compute capability 9.0): ranks 0-4, 6-7 on node1" in told
    assert "the CPU: rank 5 on node2" in told
    assert "ranks 2 and 6 on node1 have the same GPU" in fault_of([*eight[:6], replace(eight[2], rank=6)])
    assert not fault_of([eight[0], replace(eight[0], rank=8, host="node2")])  # a virtual GPU's number may repeat
    assert numbers([4]) == "rank 4"


def _exchange_on_two_ranks(kinds: list[DeviceFacts]) -> list[Any]:
    port = choose_port()

    def one(rank: int) -> Any:
        # as `Start.meet` makes it: a limit of its own that is shorter than a slow rank's start
        store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=timedelta(seconds=10), wait_for_workers=False)
        try:
            return exchange(DistributedContext(rank, 2, rank), kinds[rank], store), store
        except InputError as error:
            return str(error), store

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def test_every_rank_gets_the_same_verdict_through_the_store() -> None:
    other = replace(H100, rank=1, uuid="GPU-b")
    (first, _store), (second, _) = _exchange_on_two_ranks([H100, other])
    assert first == [H100, other]
    assert second == [other]
    (first, _store), (second, _) = _exchange_on_two_ranks([H100, replace(describe(1, torch.device("cpu")), rank=1)])
    assert first == second
    assert "not of one kind" in first


def test_below_sm80_the_kernel_is_one_that_works_and_bf16_is_refused(gpus: Any) -> None:
    cuda = torch.device("cuda", 0)
    gpus(1, (7, 5))
    assert choose_kernel(cuda) == (ONE_BY_ONE, None)
    with pytest.raises(InputError, match=r"bf16, which a GPU of compute capability 7\.5 does not have; take fp16"):
        check_precision("bf16", (7, 5), "stages.x.engine.precision")
    check_precision("fp16", (7, 5), "")
    assert as_record(cuda, "fp16")["attention"] == ONE_BY_ONE
    gpus(1, (8, 0))
    name, kernel = choose_kernel(cuda)
    assert kernel is not None
    check_precision("bf16", (8, 0), "")
    expected = {"device": "NVIDIA H100 80GB HBM3", "memory_gb": 85.0, "capability": "8.0", "precision": "bf16"}
    assert as_record(cuda, "bf16") == {**expected, "attention": name}
    assert as_record(cuda, "fp32")["attention"] == ONE_BY_ONE
    assert Segments.of(torch.zeros(2, dtype=torch.int32), [3]).kernel is None  # on the CPU


def test_the_allocator_grows_its_blocks_unless_somebody_says_otherwise() -> None:
    nothing: dict[str, str] = {}
    set_allocator(nothing)
    assert nothing == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        chosen = {name: "backend:native"}
        set_allocator(chosen)
        assert chosen == {name: "backend:native"}
