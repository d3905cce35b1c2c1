"""Classifies errors of torch: whether another rank was lost, and one line for the user.

Classified by type where torch has one. Two backends give less information; their texts are parsed only here:

    NCCL   DistBackendError for every NCCL error, this process's own mistakes included (the constants' names)
    gloo   a plain RuntimeError (its exceptions derive from std::runtime_error and torch translates none of them)
"""

from __future__ import annotations

import re

from trainer.distributed.ports import CHOOSE_ANOTHER

_NCCL_OWN_FAULT = re.compile(r"\bnccl(InvalidUsage|InvalidArgument|UnhandledCudaError)\b")
"""Answers of NCCL that are about this process: two ranks on one GPU, a CUDA error. torch writes the constant's name
into the message (`getNcclErrorDetailStr`, torch/csrc/distributed/c10d/NCCLUtils.cpp)."""

_GLOO_TRANSPORT = re.compile(r"\bgloo/(transport|rendezvous)/\S+:\d+\]|^Gloo connectFullMesh failed")
"""Where gloo raises when a peer is gone or late: its messages begin with `[FILE:LINE]` (`GLOO_ERROR_MSG`,
gloo/common/error.h), as in `[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer`. What follows may be
"closed", "reset" or "timed out", and the build's root stands before `gloo/`. When a group is made torch puts its own
words first, and the place may be missing (the constructor in torch/csrc/distributed/c10d/ProcessGroupGloo.cpp)."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective, the store or the meeting of the ranks failed because another process could not be reached.

    This process is then intact, as is its last checkpoint; the watchdog finds out which rank was lost.

    Sources: torch 2.13, c10/util/Exception.h (`DistError` and what derives from it), torch/csrc/Exceptions.cpp.
    """
    from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

    if isinstance(error, DistNetworkError | DistStoreError):
        return True
    if isinstance(error, DistBackendError):
        return _NCCL_OWN_FAULT.search(str(error)) is None
    return type(error) is RuntimeError and _GLOO_TRANSPORT.search(str(error)) is not None


def describe(error: BaseException, max_length: int = 200) -> str:
    """The first line of an error (C++ traces and NCCL's log follow it); for a taken port with what to do."""
    taken = re.search(r"\bport: (\d+),.*\bEADDRINUSE\b", str(error))
    if taken is not None:
        return f"port {taken[1]} is taken by another process of this machine; {CHOOSE_ANOTHER}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:max_length] if lines else type(error).__name__
