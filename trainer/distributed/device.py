"""Which device this process trains on, whether it can be used, and that the ranks' devices are of one kind.

    environment -> choose_device -> DeviceFacts --the ranks' store--> rank 0 compares -> one verdict for all

A GPU that a launcher or a scheduler announces and that torch cannot use is wrong input: the run would go on
on the CPU, a thousand times slower, or mix gloo with NCCL. DS_ACCELERATOR=cpu chooses the CPU on purpose; it is
DeepSpeed's own variable, which has to agree.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from models.common.documents import parse
from models.common.errors import InputError, single_line
from trainer.distributed.context import DistributedContext
from trainer.distributed.store import NO_TIMEOUT

ANNOUNCEMENTS = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")
"""Variables by which a user, a launcher or Slurm says that a process has GPUs."""

HIDDEN = ("", "-1", "NoDevFiles")
"""Values of these that announce none; NoDevFiles is Slurm's."""

BF16_CAPABILITY = (8, 0)
"""Below it a device has no bf16: torch computes it in fp32, many times slower."""

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables that set up torch's allocator: the name that every supported version knows, and the new one."""

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class DeviceFacts:
    """What one rank says of its device to the others."""

    rank: int
    host: str
    device: str
    """torch's name of it, `cpu` or `cuda` with its number."""
    name: str
    memory_bytes: int
    """Of a GPU; 0 for the CPU."""
    capability: tuple[int, int] | None
    uuid: str
    """Tells two GPUs apart; empty for the CPU."""

    @property
    def kind(self) -> str:
        """What all ranks' devices must have in common."""
        if self.capability is None:
            return "the CPU"
        major, minor = self.capability
        return f"{self.name} ({self.memory_bytes / 1e9:.0f} GB, compute capability {major}.{minor})"


def choose_device(local_rank: int, environment: Mapping[str, str] = os.environ) -> Any:
    """This process's `torch.device`: of several visible GPUs its own one, the only one where one is visible.

    Sites may show each task one GPU (`--gpus-per-task=1`): every task's is then `cuda:0`.

    Raises:
        InputError: GPUs are announced, and torch can use none, or not as many as there are ranks here.
    """
    import torch

    if environment.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    said, visible = announced(environment), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible == 0 and said:
        raise InputError(
            f"GPUs are announced ({said}), but torch can use none: {_why_unusable()}; "
            "mend that, or set DS_ACCELERATOR=cpu to train on the CPU on purpose"
        )
    if visible == 0:
        return torch.device("cpu")
    if visible == 1:
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise InputError(
            f"local rank {local_rank}, but {visible} GPUs are visible on {socket.gethostname()} ({said or 'no limit'}):"
            f" start one rank for each GPU of a machine, {visible} here"
        )
    return torch.device("cuda", local_rank)


def set_allocator(environment: MutableMapping[str, str]) -> None:
    """Let torch's allocator grow its blocks, unless somebody has set it up; torch reads this when it first uses a GPU.

    A step's batches differ in length from step to step, which leaves holes that the next one does not fit
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf).
    """
    if not any(environment.get(name) for name in ALLOCATOR):
        environment[ALLOCATOR[0]] = "expandable_segments:True"


def announced(environment: Mapping[str, str]) -> str:
    """The variables that say that this process has GPUs, as NAME=VALUE; empty where none does.

    An empty CUDA_VISIBLE_DEVICES, or -1, hides them all from CUDA, whatever the others say.
    """
    if environment.get("CUDA_VISIBLE_DEVICES") in HIDDEN:
        return ""
    values = {name: environment.get(name, "") for name in ANNOUNCEMENTS}
    if values["SLURM_GPUS_ON_NODE"] == "0":
        del values["SLURM_GPUS_ON_NODE"]
    return ", ".join(f"{name}={value}" for name, value in values.items() if value not in HIDDEN)


def _why_unusable() -> str:
    """The torch build, the driver, and what CUDA itself says."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"this is torch {torch.__version__}, which was built without CUDA ({_driver()})"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch {torch.__version__} for CUDA {torch.version.cuda}, {_driver()}: {single_line(error)}"
    return f"torch {torch.__version__} for CUDA {torch.version.cuda} sees no device, {_driver()}"


def _driver() -> str:
    try:
        return f"driver: {_DRIVER.read_text(encoding='utf-8').splitlines()[0].strip()}"
    except (OSError, IndexError):
        return f"no NVIDIA driver is loaded: {_DRIVER} is not there"


def describe(rank: int, device: Any) -> DeviceFacts:
    """What this rank says of its device."""
    import torch

    host = socket.gethostname()
    if device.type != "cuda":
        return DeviceFacts(rank, host, str(device), "cpu", 0, None, "")
    found = torch.cuda.get_device_properties(device)
    uuid = str(getattr(found, "uuid", ""))
    return DeviceFacts(rank, host, str(device), found.name, found.total_memory, (found.major, found.minor), uuid)


def exchange(ranks: DistributedContext, mine: DeviceFacts, store: Any) -> list[DeviceFacts]:
    """Every rank's device, by rank on the first rank; the others get their own alone. Every rank must call it.

    It waits for a rank that does not without end: see `trainer.distributed.watchdog.limited_start`.

    Through the ranks' store, since a process group needs to know the backend that this decides. The first rank reads
    what all say, and the others read its verdict: as many look-ups as ranks, not their square.

    Raises:
        InputError: on every rank, they are not of one kind, or two ranks share a GPU.
    """
    if ranks.world_size == 1:
        return [mine]
    store.set(f"sightline/device/{ranks.rank}", json.dumps(asdict(mine)))
    if not ranks.is_first:
        store.wait(["sightline/devices"], NO_TIMEOUT)
        fault, found = store.get("sightline/devices").decode(), [mine]
    else:
        found = []
        for rank in range(ranks.world_size):
            store.wait([f"sightline/device/{rank}"], NO_TIMEOUT)
            found.append(_read(store.get(f"sightline/device/{rank}").decode()))
        fault = fault_of(found)
        store.set("sightline/devices", fault)
    if fault:
        raise InputError(fault)
    return found


def _read(text: str) -> DeviceFacts:
    value = parse(text, "a rank's device")
    capability = value["capability"]
    return DeviceFacts(**{**value, "capability": None if capability is None else tuple(capability)})


def fault_of(found: Sequence[DeviceFacts]) -> str:
    """Why ranks on these devices cannot train together, in one line; empty where they can."""
    by_kind: dict[str, list[DeviceFacts]] = {}
    owner: dict[tuple[str, str], int] = {}
    for each in found:
        by_kind.setdefault(each.kind, []).append(each)
        if each.uuid:
            other = owner.setdefault((each.host, each.uuid), each.rank)
            if other != each.rank:
                return (
                    f"ranks {other} and {each.rank} on {each.host} have the same GPU ({each.name}, {each.uuid}): "
                    "start one rank for each GPU"
                )
    if len(by_kind) == 1:
        return ""
    listed = "; ".join(
        f"{kind}: {numbers([each.rank for each in some])} on {', '.join(dict.fromkeys(each.host for each in some))}"
        for kind, some in by_kind.items()
    )
    return f"the ranks' devices are not of one kind ({listed}); start on machines of one kind, or mend the odd one"


def summary(found: Sequence[DeviceFacts]) -> str:
    """One line for the log: `ranks 0-7 on node1: NVIDIA H100 80GB HBM3 (85 GB, compute capability 9.0)`."""
    by_host = [
        (host, kind, [each.rank for each in some])
        for (host, kind), some in groupby(found, key=lambda each: (each.host, each.kind))
    ]
    return "; ".join(f"{numbers(some)} on {host}: {kind}" for host, kind, some in by_host)


def numbers(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-3, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"


def as_record(device: Any, precision: str, *, is_deterministic: bool = False) -> dict[str, Any]:
    """What a stage computes with, for its log: the device, its memory, the precision and the attention's kernel."""
    from models.attention import ONE_BY_ONE, choose_kernel

    facts = describe(0, device)
    record: dict[str, Any] = {"device": facts.name}
    if facts.capability is not None:
        record |= {"memory_gb": round(facts.memory_bytes / 1e9, 1), "capability": "{}.{}".format(*facts.capability)}
    kernel, _ = choose_kernel(device)
    record |= {"precision": precision, "attention": ONE_BY_ONE if precision == "fp32" else kernel}
    return {**record, "deterministic": True} if is_deterministic else record


def check_precision(precision: str, capability: tuple[int, int] | None, where: str) -> None:
    """Raise InputError for bf16 on a GPU that has none."""
    if precision == "bf16" and capability is not None and capability < BF16_CAPABILITY:
        raise InputError(
            f"{where}: bf16, which a GPU of compute capability {capability[0]}.{capability[1]} does not have; "
            "take fp16, or fp32"
        )
