"""Ranks of a start as real processes, each of which does one thing after it was begun as the trainer begins."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from models.common.errors import run_cli
from tests.support.ranks import forkserver_context
from trainer.distributed.context import from_environment
from trainer.distributed.ports import choose_port
from trainer.distributed.preemption import PreemptionHandler
from trainer.distributed.start import Start

LIMIT_S = 120.0
"""Guards against waiting for ever; nothing is measured by it."""

Act = Callable[[Start], Any]


def stand_still(start: Start) -> None:
    """Meet the others, say it, and do nothing."""
    start.meet()
    print("met", flush=True)
    time.sleep(10 * LIMIT_S)


def run_rank(rank: int, acts: list[Act], port: int, run: str, log: str) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(len(acts)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def main(argv: list[str]) -> int:
        PreemptionHandler().install()
        start = Start(from_environment(), run, timeout_s=10 * LIMIT_S).open()
        try:
            with start.phase():
                acts[rank](start)
        finally:
            start.close()
            start.linger()
        return 0

    os._exit(run_cli(main, []))


@dataclass
class Ranks:
    """Real processes, each with its output in a file."""

    processes: list[BaseProcess]
    logs: list[Path]

    def output(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def wait_until_met(self) -> None:
        end_s = time.monotonic() + LIMIT_S
        while not all(log.exists() and "met" in log.read_text() for log in self.logs):
            assert time.monotonic() < end_s
            time.sleep(0.05)

    def ends(self) -> list[tuple[int | None, str]]:
        """Exit code and output of each; the word that says that they met is left out."""
        for process in self.processes:
            process.join(LIMIT_S)
        return [
            (process.exitcode, self.output(rank).replace("met\n", "")) for rank, process in enumerate(self.processes)
        ]


@contextmanager
def ranks(folder: Path, *acts: Act, port: int | None = None, run: str = "a run") -> Iterator[Ranks]:
    port = port or choose_port()
    logs = [folder / f"{run}.{rank}.log" for rank in range(len(acts))]
    processes: list[BaseProcess] = [
        forkserver_context().Process(target=run_rank, args=(rank, list(acts), port, run, str(log)))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    try:
        yield Ranks(processes, logs)
    finally:
        for process in processes:
            process.kill()
            process.join()
