"""A lost rank is told from a mistake of this process by what torch really raises: real processes, killed."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist

from models.common.memory import is_out_of_memory
from tests.support.ranks import forkserver_context
from trainer.distributed.failures import describe, is_lost_peer
from trainer.distributed.ports import choose_port

TIMEOUT_S = 120.0
"""Of a collective; nothing here waits for it, since a killed process closes its sockets."""


def all_reduce() -> None:
    dist.all_reduce(torch.zeros(4, dtype=torch.float64))


def broadcast_object() -> None:
    dist.broadcast_object_list([None], src=1)


def gather_objects() -> None:
    dist.all_gather_object([None, None], "a value")


def reduce_scatter() -> None:
    dist.reduce_scatter_tensor(torch.zeros(2), torch.zeros(4))


def wait_in_store() -> None:
    dist.distributed_c10d._get_default_store().wait(["never written"], timedelta(seconds=TIMEOUT_S))


def meet(rank: int, port: int, timeout_s: float = TIMEOUT_S) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))


def survive(answer: Connection, rank: int, port: int, call: Callable[[], None]) -> None:
    """Meet the other rank, call, and send what was raised as (whether a peer was lost, one line)."""
    meet(rank, port)
    dist.barrier()
    try:
        while True:  # until the other is gone
            call()
    except Exception as error:
        answer.send((is_lost_peer(error), describe(error)))


def die(rank: int, port: int) -> None:
    meet(rank, port)
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "victim"),
    [
        (all_reduce, 1),
        (all_reduce, 0),
        (broadcast_object, 1),
        (gather_objects, 1),
        (reduce_scatter, 1),
        (wait_in_store, 0),  # the store lives in the first rank
    ],
)
def test_a_killed_rank_is_a_lost_peer_to_the_other(call: Callable[[], None], victim: int) -> None:
    context, port = forkserver_context(), choose_port()
    receiver, sender = context.Pipe(duplex=False)
    processes = [
        context.Process(target=survive, args=(sender, 1 - victim, port, call)),
        context.Process(target=die, args=(victim, port)),
    ]
    for process in processes:
        process.start()
    try:
        sender.close()
        assert receiver.poll(TIMEOUT_S)
        is_lost, line = receiver.recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert is_lost, line
    assert "\n" not in line


def test_a_port_that_is_taken_is_said_and_so_is_a_rank_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what `meet` sets does not stay
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(dist.DistNetworkError) as taken:
            meet(0, port)
    assert is_lost_peer(taken.value)
    assert describe(taken.value).startswith(f"port {port} is taken by another process")
    with pytest.raises(dist.DistStoreError) as absent:
        meet(0, choose_port(), timeout_s=0.5)
    assert is_lost_peer(absent.value)
    with pytest.raises(dist.DistNetworkError) as nobody:
        meet(1, choose_port(), timeout_s=0.5)
    assert is_lost_peer(nobody.value)


NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3699, {}, NCCL version 2.27.3\n{}: {}\nLast error:\n{}"


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (dist.DistBackendError(NCCL.format("remote process exited", "ncclRemoteError", "A call failed", "")), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 3"), True),
        (dist.DistBackendError(NCCL.format("invalid usage", "ncclInvalidUsage", "", "Duplicate GPU detected")), False),
        (dist.DistBackendError(NCCL.format("unhandled cuda", "ncclUnhandledCudaError", "", "out of memory")), False),
        (RuntimeError("[/build/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting"), True),
        (RuntimeError("Gloo connectFullMesh failed with Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("Connection to the object store closed"), False),  # words alone mean nothing
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ConnectionResetError("a data source's"), False),
    ],
)
def test_types_decide_and_words_only_where_there_is_no_type(error: BaseException, is_lost: bool) -> None:
    assert is_lost_peer(error) is is_lost


def test_one_line_is_made_of_any_error() -> None:
    assert describe(RuntimeError("\n  first \nsecond")) == "first"
    assert describe(RuntimeError("x" * 500), max_length=10) == "x" * 10
    assert describe(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (dist.DistBackendError(NCCL.format("x", "ncclUnhandledCudaError", "", "Cuda failure 2 'out of memory'")), True),
        (
            dist.DistBackendError(
                NCCL.format("x", "ncclUnhandledCudaError", "", "Failed to CUDA calloc async 4 bytes")
            ),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of memory, said a data source"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_told_by_type_and_by_cudas_own_words(error: BaseException, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


def test_the_hosts_memory_is_told_too() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    assert is_out_of_memory(error.value)
