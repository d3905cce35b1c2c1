"""The store in which ranks meet: torch's TCPStore at MASTER_ADDR:MASTER_PORT, and what its own limits leave out.

torch's client connects within a limit, but reads an answer without one (TCPStore.cpp, recvBytes): a stranger at the
port, or a rank 0 that was stopped, would hold every rank for ever. So whatever asks the store asks through `in_time`.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

from models.common.errors import InputError
from trainer.distributed.context import DistributedContext
from trainer.distributed.ports import CHOOSE_ANOTHER
from trainer.distributed.running_time import RunningTime

POLL_S = 0.25
"""Between two looks into the store, and between two tries to reach it."""

HANDSHAKE_S = 10.0
"""In which whoever listens at the ranks' port must have answered as rank 0 of this run."""

NO_TIMEOUT = timedelta(days=30)
"""Of whatever torch waits for: the store, and a collective. torch's clock counts time in which the process did not run,
and so takes a job that was suspended for one that hangs. Only what counts by `RunningTime` ends a start or a run."""

_FIRST = "sightline/first"


def join_store(
    ranks: DistributedContext, run: str, timeout_s: float, environment: Mapping[str, str] = os.environ
) -> Any:
    """The ranks' store at MASTER_ADDR:MASTER_PORT, which rank 0 makes, or under torchrun the agent.

    Raises:
        InputError: another process has the port, or it is no port.
        DistNetworkError: rank 0 did not listen within `timeout_s`.
    """
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(
            f"MASTER_ADDR={address!r}, MASTER_PORT={port!r}: no address and port at which the ranks can meet; start "
            "through a launcher"
        )
    from torch.distributed import DistNetworkError, PrefixStore  # type: ignore[attr-defined]

    taken = InputError(f"port {port} of {address} is taken by another process; {CHOOSE_ANOTHER}")
    is_agents = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not ranks.is_first or is_agents:
        _wait_for_listener(address, int(port), timeout_s)
    try:
        store = in_time(lambda: _connect(address, int(port), ranks, is_agents), HANDSHAKE_S)
    except DistNetworkError as error:
        if is_agents:
            raise
        raise taken from error
    if is_agents:
        return PrefixStore(f"sightline/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if ranks.is_first:
        store.set(_FIRST, run)
    # Another training run may hold the port, whose store answers as well as ours: it knows nothing of this start, or
    # has a process of this rank already.
    try:
        is_ours = in_time(lambda: store.get(_FIRST).decode() == run, HANDSHAKE_S)
    except Exception as error:
        raise taken from error
    if not is_ours or in_time(lambda: store.add(f"sightline/rank/{ranks.rank}", 1), HANDSHAKE_S) != 1:
        raise taken
    return store


def _connect(address: str, port: int, ranks: DistributedContext, is_agents: bool) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(
        address,
        port,
        ranks.world_size,
        is_master=ranks.is_first and not is_agents,
        timeout=NO_TIMEOUT,
        wait_for_workers=False,
    )


def _wait_for_listener(address: str, port: int, timeout_s: float) -> None:
    """Until something listens there; rank 0 may be slower to start. In steps, so that signals are heard."""
    from torch.distributed import DistNetworkError

    running = RunningTime(2 * POLL_S + 1)
    while True:
        try:
            socket.create_connection((address, port), timeout=1.0).close()
            return
        except OSError as error:
            if running.seconds() > timeout_s:
                raise DistNetworkError(
                    f"rank 0 does not listen at {address}:{port} after {timeout_s:.0f} s: {error}"
                ) from None
        time.sleep(POLL_S)


def in_time(call: Callable[[], Any], limit_s: float) -> Any:
    """The value of a call that may never return: torch's store reads without a limit what a stranger does not send."""
    results: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

    def run() -> None:
        try:
            results.put((call(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=run, name="store", daemon=True).start()
    running = RunningTime(2 * POLL_S)
    while running.seconds() < limit_s:
        with suppress(Empty):
            value, fault = results.get(timeout=POLL_S)
            if fault is not None:
                raise fault
            return value
    from torch.distributed import DistNetworkError

    raise DistNetworkError(f"rank 0's store has not answered within {limit_s:.0f} s")
