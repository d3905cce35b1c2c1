"""Joining and leaving the process group that DeepSpeed and every collective of a run use."""

from __future__ import annotations

import logging
import os
from typing import Any

import deepspeed
import torch
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

from trainer.distributed.context import DistributedContext
from trainer.distributed.device import choose_device, describe, exchange, summary
from trainer.distributed.store import NO_TIMEOUT
from trainer.distributed.watchdog import limited_start

logger = logging.getLogger(__name__)


def start_distributed(ranks: DistributedContext, timeout_s: float, store: Any = None) -> torch.device:
    """Join the process group: NCCL where this process trains on a GPU, gloo elsewhere. A second call changes nothing.

    Args:
        timeout_s: seconds within which the ranks must have met.
        store: where they meet (`trainer.distributed.start`), and where their devices are compared first; None: at
            MASTER_ADDR and MASTER_PORT, for tests and benchmarks of ranks that are alike. A rank that is alone meets
            nobody and takes no port.

    Returns:
        The device of this rank.

    Raises:
        InputError: GPUs that are announced cannot be used, or the ranks' devices are not of one kind.
    """
    device = choose_device(ranks.local_rank)
    # On a CPU deepspeed/comm/torch.py (build_shm_op) compiles a shared-memory op here: 40 s of a C++ compiler, and it
    # hangs on its lock file if a build was once killed. gloo does the same reductions. This private table is what
    # op_builder asks whether the op can be built.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cuda":
        # deepspeed/runtime/engine.py (_set_distributed_vars) takes the device from there.
        os.environ["LOCAL_RANK"] = str(device.index)
        torch.cuda.set_device(device)
        # By default cuDNN's convolutions of fp32 numbers, such as a tower's patches, are rounded to 10 bits.
        torch.backends.cudnn.allow_tf32 = False
    # NCCL's own monitor (ProcessGroupNCCL.cpp, HeartbeatMonitor) ends a process whose watchdog thread was not seen for
    # 8 minutes, which is what a suspended process looks like.
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    backend = "nccl" if device.type == "cuda" else "gloo"
    with limited_start(ranks, timeout_s):
        if not torch.distributed.is_initialized():
            if store is None and ranks.world_size == 1:
                store = HashStore()
            if store is not None:
                logger.info(summary(exchange(ranks, describe(ranks.rank, device), store)))
                torch.distributed.init_process_group(
                    backend,
                    store=PrefixStore("group", store),
                    rank=ranks.rank,
                    world_size=ranks.world_size,
                    timeout=NO_TIMEOUT,
                )
        deepspeed.init_distributed(dist_backend=backend, timeout=NO_TIMEOUT, verbose=False)
    return device


def leave_distributed() -> None:
    """Leave the process group. Without this a process waits for its peers' sockets at exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
