"""Starts the ranks of a training run on this machine, repeatedly: real processes that run the training command.

A fork server has torch, DeepSpeed and transformers imported already, so that a start saves the seconds of importing
them. Nothing else differs from `python trainer/main.py`. Owns the processes; the caller decides what happens to them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from trainer.distributed.ports import choose_port

PRELOADED = (
    "torch",
    "torch._dynamo",  # torch imports it when the first optimizer is made
    "deepspeed",
    "transformers",
    "peft",
    "trainer.build",
    "trainer.loop",
    "trainer.local_ranks",
)
POLL_S = 0.01


def fork_server() -> ForkServerContext:
    """A context whose processes are forked from one that has imported everything that a rank imports."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


@dataclass
class RankGroup:
    """The ranks of one start."""

    processes: list[BaseProcess]

    @classmethod
    def start(
        cls,
        context: ForkServerContext,
        world_size: int,
        arguments: Sequence[str],
        log: Path,
        prepare: Callable[[], None] | None = None,
    ) -> RankGroup:
        """Start `python trainer/main.py ARGUMENTS` on `world_size` ranks; their output is appended to `log`.

        Args:
            prepare: called in each rank before the command: what its machine is to be like. Must be importable.
        """
        port = choose_port()
        processes: list[BaseProcess] = []
        for rank in range(world_size):
            launch = _Launch(rank, world_size, port, list(arguments), str(log), prepare)
            process = context.Process(target=_run_rank, args=(launch,))
            process.start()
            processes.append(process)
        return cls(processes)

    @property
    def is_alive(self) -> bool:
        """Whether any rank is running."""
        return any(process.is_alive() for process in self.processes)

    def send(self, number: signal.Signals, ranks: Sequence[int]) -> None:
        """Send a signal to some ranks; one that has ended already is left out."""
        for rank in ranks:
            process = self.processes[rank]
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self, timeout_s: float, *, ended: Callable[[Sequence[bool]], bool] = all) -> bool:
        """Wait until all ranks have ended, with `ended=any` one of them; False on timeout."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            if ended([not process.is_alive() for process in self.processes]):
                return True
            time.sleep(POLL_S)
        return False

    def codes(self) -> list[int | None]:
        """Each rank's exit code: None while it runs, negative where a signal ended it."""
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """Kill the remaining processes, stopped ones included, and wait for their end."""
        self.send(signal.SIGKILL, range(len(self.processes)))
        for process in self.processes:
            process.join()


@dataclass(frozen=True)
class _Launch:
    """What one rank is started with."""

    rank: int
    world_size: int
    port: int
    arguments: list[str]
    log: str
    prepare: Callable[[], None] | None


def _run_rank(launch: _Launch) -> None:
    """What a launcher does for one rank: environment, output, the command."""
    import torch

    descriptor = os.open(launch.log, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # The fork server's tracker would keep the semaphores of killed ranks to its end and then call them leaked. Without
    # it a rank starts one of its own, as in a process that a launcher started.
    resource_tracker._resource_tracker._fd = None  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(launch.rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(launch.port),
    )
    from models.common.errors import run_cli
    from trainer.main import main

    if launch.prepare is not None:
        launch.prepare()

    code = run_cli(main, launch.arguments)
    os._exit(code)
