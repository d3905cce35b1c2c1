"""The cores that the threads of this process may run on: Linux's affinity masks, thread by thread.

    process's cores 0 1 2 3 --two OpenMP threads--> main thread 0 1 | second thread 2 3 | all other threads 0 1 2 3

Owns how threads are bound; which cores a rank gets is decided in `trainer.distributed.cores`. A thread and a process
begin with the mask of the thread that starts them, so what is to have all of the process's cores is started inside
`unbound`. Loads without torch.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_LIBRARIES = ("libgomp", "libiomp5", "libomp")
"""OpenMP runtimes that have GOMP_parallel: GNU's, and those of Intel and LLVM, which take its calls too."""

_whole: frozenset[int] | None = None
"""The process's cores while its computing threads are bound to parts of them."""


def allowed() -> frozenset[int]:
    """The cores that this thread may run on; empty where the system does not tell."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def in_order(cores: Iterable[int], topology: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """Cores such that those of one socket stand together, and in it hyper-threads of one physical core."""

    def place(core: int) -> tuple[int, int, int]:
        facts = topology / f"cpu{core}" / "topology"
        try:
            return int((facts / "physical_package_id").read_text()), int((facts / "core_id").read_text()), core
        except (OSError, ValueError):
            return 0, core, core

    return sorted(cores, key=place)


def share(cores: Sequence[int], place: int, number: int) -> Sequence[int]:
    """The `place`-th of `number` shares of cores: contiguous, and of lengths that differ by 1 at most."""
    return cores[place * len(cores) // number : (place + 1) * len(cores) // number]


def quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """How many cores' time the process's control group may use; None where it is not limited."""
    found: list[float] = []
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            folder = root / line.split(":", 2)[-1].lstrip("/")
            for each in (folder, *folder.parents):
                with suppress(OSError, ValueError):
                    limit, period = (each / "cpu.max").read_text().split()
                    found.append(int(limit) / int(period))  # "max" is no number
                if each == root:
                    break
    for each in (root, root / "cpu"):  # version 1
        with suppress(OSError, ValueError):
            limit_us = int((each / "cpu.cfs_quota_us").read_text())
            if limit_us > 0:
                found.append(limit_us / int((each / "cpu.cfs_period_us").read_text()))
    return min(found, default=None)


def bind(cores: Sequence[int], num_threads: int) -> None:
    """Give the process these cores, and each of its `num_threads` OpenMP threads a share of them.

    The calling thread is the first of them. Where the OpenMP runtime is not found its threads have all of the cores.
    """
    global _whole  # noqa: PLW0603 - masks are the process's own state
    _set_all(cores)
    if num_threads > 1 and _bind_team([set(share(cores, each, num_threads)) for each in range(num_threads)]):
        _whole = frozenset(cores)


def release(cores: Iterable[int]) -> None:
    """Let every thread run on these cores, as before `bind`."""
    global _whole  # noqa: PLW0603
    _whole = None
    _set_all(cores)


@contextmanager
def unbound() -> Iterator[None]:
    """The calling thread may use all of the process's cores, and so may the threads and processes it starts inside."""
    if _whole is None:
        yield
        return
    own = allowed()
    os.sched_setaffinity(0, _whole)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def _set_all(cores: Iterable[int]) -> None:
    mask = set(cores)
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended since
            os.sched_setaffinity(int(thread.name), mask)


def _bind_team(shares: Sequence[set[int]]) -> bool:
    """Have each thread of the calling thread's OpenMP team set its own mask; whether the runtime was found.

    OMP_PLACES does the same, but is read once, when torch is loaded, before the ranks know of one another.
    """
    file = _runtime()
    if file is None:
        return False
    runtime = ctypes.CDLL(str(file))
    procedure = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    def bind_one(_data: int | None) -> None:
        with suppress(OSError, IndexError):
            os.sched_setaffinity(threading.get_native_id(), shares[runtime.omp_get_thread_num()])

    try:
        run = runtime.GOMP_parallel
    except AttributeError:
        return False
    run.argtypes, run.restype = [procedure, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    run(procedure(bind_one), None, len(shares), 0)
    return True


def _runtime() -> Path | None:
    """The OpenMP runtime that torch has loaded: the one in its own folder, or the only one there is."""
    with suppress(OSError):
        lines = Path("/proc/self/maps").read_text().splitlines()
        files = {Path(line.split()[-1]) for line in lines if "/" in line}
        found = sorted(file for file in files if file.name.startswith(_LIBRARIES))
        own = [file for file in found if file.parent.parent.name == "torch"] or found
        return own[0] if len(own) == 1 else None
    return None
