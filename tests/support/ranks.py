"""Runs a function on several gloo ranks, each a fresh process, and hands back what each returned."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from trainer.ranks import Ranks


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300) -> list[Any]:
    """`function(ranks, *arguments)` on every rank; it must be importable. An exception on any rank is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(world_size, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_one_rank, rank, world_size, port, function, arguments) for rank in range(world_size)]
        return [future.result(timeout=timeout_s) for future in futures]


def _one_rank(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    return function(Ranks(rank, world_size, rank), *arguments)
