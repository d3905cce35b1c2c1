"""Runs a function on several gloo ranks, each a fresh process, and hands back what each returned."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.context import BaseContext, ForkServerContext
from typing import Any

from tests.support.patience import GUARD_S
from trainer.distributed.context import from_environment
from trainer.distributed.ports import choose_port

PRELOADED = [
    *("trainer.loop", "trainer.build", "trainer.objectives.next_token", "models.encoders.pretrained"),
    *("models.languages.pretrained", "deepspeed", "deepspeed.module_inject.auto_ep_layer"),
    *("deepspeed.ops.op_builder.all_ops", "setuptools.dist", "peft", "torch._dynamo"),
    *("transformers.models.auto.processing_auto", "transformers.models.clip.modeling_clip"),
    *("transformers.models.llama.modeling_llama", "PIL.JpegImagePlugin", "PIL.PngImagePlugin"),
]
"""What takes seconds to import and every rank needs: imported once, in a process that the ranks are forked from."""


def run_on_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = GUARD_S
) -> list[Any]:
    """`function(ranks, *arguments)` on every rank; it must be importable. An exception on any rank is raised here."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(choose_port())}
    environment = {**os.environ, "WORLD_SIZE": str(world_size), **meeting}
    with ProcessPoolExecutor(world_size, mp_context=_context()) as pool:
        futures = [
            pool.submit(_one_rank, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, function, arguments)
            for rank in range(world_size)
        ]
        return [future.result(timeout=GUARD_S) for future in futures]


def _context() -> BaseContext:
    """A GPU cannot be used in a process forked from one that has looked for it, as DeepSpeed's import does."""
    on_gpu = os.environ.get("DS_ACCELERATOR") == "cuda"
    return get_context("spawn") if on_gpu else forkserver_context()


def forkserver_context() -> ForkServerContext:
    """The one fork server of a test process: what it preloads is decided by whoever starts the first rank."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _one_rank(environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch

    torch.set_num_threads(1)
    os.environ.clear()  # that of the process the ranks are forked from may be older
    os.environ.update(environment)
    return function(from_environment(dict(environment)), *arguments)
