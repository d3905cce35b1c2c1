"""Runs a function on several gloo ranks, each a fresh process, and hands back what each returned."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from typing import Any

from trainer.ranks import from_environment

PRELOADED = ["trainer.loop", "trainer.opening", "deepspeed", "peft"]
"""What takes seconds to import and every rank needs: imported once, in a process that the ranks are forked from."""


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300) -> list[Any]:
    """`function(ranks, *arguments)` on every rank; it must be importable. An exception on any rank is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ProcessPoolExecutor(world_size, mp_context=_context()) as pool:
        futures = [
            pool.submit(_one_rank, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, function, arguments)
            for rank in range(world_size)
        ]
        return [future.result(timeout=timeout_s) for future in futures]


def _context() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _one_rank(environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch

    torch.set_num_threads(1)
    os.environ.clear()  # that of the process the ranks are forked from may be older
    os.environ.update(environment)
    return function(from_environment(dict(environment)), *arguments)
