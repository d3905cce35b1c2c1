"""Which cores a rank on a CPU computes on: those of its machine, divided among the ranks that share them.

    ranks 0 and 1 of a machine may use cores 0-7    rank 0: 0-3, rank 1: 4-7, in each a core or more for every thread
    a launcher has given rank 0 0-3, rank 1 4-7     the same: a narrower mask is never left

Two threads that nobody binds may share a core while another idles: 61 GFLOP/s were measured so, 224 bound. Numbers of
threads stay as they are, since sums depend on them; so does every number of a run. Owns the decision;
`models.common.cores` carries it out.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from models.common import cores
from trainer.distributed.context import DistributedContext

logger = logging.getLogger(__name__)

SETTINGS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Of a user who binds threads himself: nothing is done then."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    host: str
    cores: tuple[int, ...]
    """That its process may use; empty where the system does not tell."""
    num_threads: int
    """Of torch."""


@contextmanager
def bound_cores(ranks: DistributedContext, environment: Mapping[str, str]) -> Iterator[None]:
    """Inside, this rank and its threads have their own cores; one line of the log says which. Collective.

    Nothing is bound on a machine with a GPU: there the processor's threads feed it, and wait.
    """
    import torch

    if torch.cuda.is_available():
        yield
        return
    own = Place(socket.gethostname(), tuple(cores.in_order(cores.allowed())), torch.get_num_threads())
    mine, line = decide(ranks.rank, ranks.gather(own), environment, cores.quota())
    if line:
        logger.info(f"cores: {line}")
    if not mine:
        yield
        return
    cores.bind(mine, own.num_threads)
    try:
        yield
    finally:
        cores.release(own.cores)


def decide(
    rank: int, places: Sequence[Place], environment: Mapping[str, str], quota: float | None
) -> tuple[Sequence[int], str]:
    """A rank's cores, none where it is not to be bound, and what to say of it; both may be empty.

    Args:
        places: of all ranks, in their order.
        quota: how many cores' time the process may use; None where it is not limited.
    """
    own = places[rank]
    overlapping = [
        number
        for number, place in enumerate(places)
        if place.host == own.host and not set(own.cores).isdisjoint(place.cores)
    ]
    if not own.cores or (len(overlapping) == 1 and own.num_threads == 1):
        return (), ""
    counted = f"{len(overlapping)} ranks share {len(own.cores)} cores of {own.host}"
    unbound = f"{counted}, {own.num_threads} threads each; not bound: "
    setting = next((name for name in SETTINGS if environment.get(name)), None)
    if setting is not None:
        return (), f"{unbound}{setting} is set"
    if quota is not None and quota < len(own.cores):
        return (), f"{unbound}the control group has the time of {quota:g}"
    if any(set(places[number].cores) != set(own.cores) for number in overlapping):
        return (), f"{unbound}their masks overlap in part"
    mine = cores.share(own.cores, overlapping.index(rank), len(overlapping))
    if own.num_threads > len(mine):
        advised = max(1, len(own.cores) // len(overlapping))
        return (), f"{unbound}more threads than cores; OMP_NUM_THREADS={advised} would be faster"
    listed = ", ".join(str(core) for core in sorted(mine))
    return mine, f"{counted}; rank {rank} has {listed} for its {own.num_threads} threads, each bound to its part"
