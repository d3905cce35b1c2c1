"""Memory that is free, on the device and in the job that this process belongs to, and whether it has run out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
LIMITS = {
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "": ("", "memory.max", "memory.current", "inactive_file"),
}
"""By the controller's name in /proc/self/cgroup (versions 1 and 2): folder, limit, usage, and reclaimable memory."""


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a GPU; on the CPU the smaller of the machine's free memory and the cgroups' remainder."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":") for line in lines)
    return min(int(fields["MemAvailable"].split()[0]) * 1024, *_left_in_cgroups())


def _left_in_cgroups() -> Iterator[int]:
    """The remainder of each cgroup limit on this process, such as a job's; the page cache does not count as used."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controller, place = line.split(":", 2)
        if controller not in LIMITS:
            continue
        folder, limit, use, droppable = LIMITS[controller]
        inside = Path(place.lstrip("/"))
        for group in (CGROUPS / folder / part for part in (inside, *inside.parents)):
            if (group / limit).is_file() and (most := (group / limit).read_text().strip()) != "max":
                stat = dict(each.split() for each in (group / "memory.stat").read_text().splitlines())
                yield int(most) - int((group / use).read_text()) + int(stat.get(droppable, 0))


_NO_MEMORY = re.compile(
    r"\bCUDA error: out of memory\b|\bCuda failure \d+ 'out of memory'|\bCUBLAS_STATUS_ALLOC_FAILED\b"
    r"|\bFailed to CUDA (host )?[cm]?alloc( async)? \d+ bytes"
    r"|\bDefaultCPUAllocator: (can't allocate memory|not enough memory)"
)
"""Where memory runs out outside of torch's caching allocator, which raises a type of its own: CUDA's own calls
(c10/cuda/CUDAException.h), NCCL's buffers (in `ncclUnhandledCudaError`: `CUDACHECK` in NCCL's src/include/checks.h,
"Cuda failure 2 'out of memory'", and src/include/alloc.h, "Failed to CUDA calloc async 4 bytes", as an H200 with NCCL
2.28 said it), cuBLAS's workspace, and the host (c10/core/impl/alloc_cpu.cpp)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the host: a smaller batch is needed, and no machine is at fault."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
