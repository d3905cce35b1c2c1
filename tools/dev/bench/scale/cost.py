"""What a piece of work costs the process that does it: files opened, bytes read, CPU seconds, memory."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any


@dataclass
class Cost:
    """Counted from `begin` to `end`."""

    opens: int = 0
    bytes_read: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_bytes: int = 0
    """The most that the process ever held, Python and its libraries included."""


def in_child(work: Callable[[], Any]) -> Any:
    """The value of `work`, done in a fork of this process: what it counts and holds is its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with os.fdopen(writer, "wb") as stream:
                pickle.dump(work(), stream)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        content = stream.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise RuntimeError("the child that measured ended with an error, see above")
    return pickle.loads(content)  # of our own fork


def cost_of(work: Callable[[], Any]) -> Cost:
    """The cost of `work` in this process; called in a child, since the hook that counts opens stays."""
    opens = [0]

    def note(event: str, _: tuple[Any, ...]) -> None:
        opens[0] += event == "open"

    read = _bytes_read()
    sys.addaudithook(note)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    work()
    cpu_s, wall_s, num_opens = time.process_time() - cpu_s, time.perf_counter() - wall_s, opens[0]
    return Cost(num_opens, _bytes_read() - read, cpu_s, wall_s, _peak_bytes())


def slope(sizes: list[float], costs: list[float]) -> float | None:
    """The exponent of cost = a x size^slope by first and last: 0 where it does not grow, 1 where it is linear.

    None where there is one size alone.
    """
    if sizes[0] == sizes[-1]:
        return None
    return log(max(costs[-1], 1e-9) / max(costs[0], 1e-9)) / log(sizes[-1] / sizes[0])


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
