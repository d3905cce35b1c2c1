"""Starts the ranks of a training run quickly, again and again: real processes that run the training command.

A fork server has torch, DeepSpeed and transformers imported already, so that a start takes a second of what a person's
`python trainer/main.py` takes, and 50 of them fit into minutes. Nothing else differs.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = ["torch", "deepspeed", "transformers", "peft", "trainer.opening", "trainer.loop", "tools.chaos.ranks"]


def server() -> ForkServerContext:
    """A fork server with everything that a rank imports."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@dataclass
class Group:
    """The ranks of one start."""

    processes: list[BaseProcess]

    @classmethod
    def start(cls, context: ForkServerContext, world_size: int, words: list[str], log: Path) -> Group:
        """Start `python trainer/main.py WORDS` on so many ranks of this machine; their output is appended to `log`."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes: list[BaseProcess] = []
        for rank in range(world_size):
            process = context.Process(target=_run_rank, args=(rank, world_size, port, words, str(log)))
            process.start()
            processes.append(process)
        return cls(processes)

    @property
    def is_alive(self) -> bool:
        """Whether any rank is left."""
        return any(process.is_alive() for process in self.processes)

    def send(self, number: signal.Signals, ranks: list[int]) -> None:
        """Send a signal to some ranks; one that has ended is none the worse."""
        for rank in ranks:
            process = self.processes[rank]
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self, timeout_s: float, *, any_of_them: bool = False) -> bool:
        """Wait until all ranks, or any, have ended; whether they have."""
        end_s = time.monotonic() + timeout_s
        ended = any if any_of_them else all
        while time.monotonic() < end_s:
            if ended(not process.is_alive() for process in self.processes):
                return True
            time.sleep(0.01)
        return False

    def codes(self) -> list[int | None]:
        """The exit codes; negative ones are signals."""
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """End whatever is left, stopped processes included."""
        self.send(signal.SIGKILL, list(range(len(self.processes))))
        for process in self.processes:
            process.join()


def _run_rank(rank: int, world_size: int, port: int, words: list[str], log: str) -> None:
    """What a launcher does for one rank: environment, output, the command."""
    import torch

    descriptor = os.open(log, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from models.errors import run_cli
    from trainer.main import main, quiet_followers

    code = run_cli(quiet_followers(main), words)
    os._exit(code)
