"""Runs the encoder on draws, in worker processes or inline, and hands results back by name.

Owns the process pool. Workers are stateless functions draw -> sample: how many there are, and which one took a draw,
changes nothing but the time it takes.

A job's signals reach every process of it (Slurm's scancel and time limit, the keyboard). Only the main process answers
them: it saves, and tells its workers to go. They are deaf from their first instruction on, and end when it is gone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Protocol, runtime_checkable

from data_pipeline.sample import BadSample, Draw, Encoded

Result = Encoded | BadSample
Encode = Callable[[Draw], Result]


@runtime_checkable
class Naming(Protocol):
    """An encoder that can say which sample a draw is without reading it."""

    def name_of(self, draw: Draw) -> tuple[str, str]:
        """(shard, key) of a draw."""
        ...


RUN_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What a run is asked to stop by."""

_encode: Encode | None = None  # a worker's own copy, set once by `_start_worker`


def _start_worker(encode: Encode, parent: int) -> None:
    """A worker leaves signals that mean the run to the main process, and ends when that is gone."""
    global _encode  # noqa: PLW0603 - the executor offers no other place for a worker's own value
    _encode = encode
    for ignored in RUN_SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process once its parent was killed: an executor's worker would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run(draw: Draw) -> Result:
    assert _encode is not None
    return _encode(draw)


class _Worker(SpawnProcess):
    """A worker process: a pool that breaks ends the others by `terminate`, which they do not hear."""

    def terminate(self) -> None:
        """End at once."""
        self.kill()


class _Workers(SpawnContext):
    """Workers are spawned: forking a process that holds CUDA or threads is not safe."""

    Process = _Worker


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started inside (workers, and the standard library's tracker of semaphores) get no RUN_SIGNALS.

    They inherit the mask. A signal to this process waits for the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Fetcher:
    """Results of draws, asked for ahead of time where there are workers.

    A worker that dies (killed for memory, or crashed in a decoder) takes its pool with it: the pool is made anew and
    what was under way is asked for again. A draw that is alone in a fresh pool when the pool dies is the culprit and
    comes back as a `BadSample`.
    """

    def __init__(self, encode: Encode, num_workers: int) -> None:
        self._encode = encode
        self._num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None
        self._pending: dict[Draw, Future[Result]] = {}

    def prefetch(self, draw: Draw) -> None:
        """Begin on a draw; without workers there is nothing to do yet."""
        if self._num_workers and draw not in self._pending:
            self._pending[draw] = self._submit(draw)

    def result(self, draw: Draw) -> Result:
        """The sample of a draw; waits for it."""
        if not self._num_workers:
            return self._encode(draw)
        self.prefetch(draw)
        try:
            found = self._pending[draw].result()
        except BrokenProcessPool:
            found = self._after_a_death(draw)
        del self._pending[draw]
        return found

    def forget(self) -> None:
        """Drop everything that was asked for ahead."""
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()

    def close(self) -> None:
        """End the workers."""
        self.forget()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _submit(self, draw: Draw) -> Future[Result]:
        if self._pool is None:
            self._pool = self._new_pool(self._num_workers)
        try:
            with _deaf():  # the executor starts a process where none is idle
                return self._pool.submit(_run, draw)
        except BrokenProcessPool:
            broken: Future[Result] = Future()
            broken.set_exception(BrokenProcessPool("the pool broke before this draw was taken"))
            return broken

    def _new_pool(self, num_workers: int) -> ProcessPoolExecutor:
        with _deaf():
            return ProcessPoolExecutor(
                num_workers,
                mp_context=_Workers(),
                initializer=_start_worker,
                initargs=(self._encode, os.getpid()),
            )

    def _after_a_death(self, draw: Draw) -> Result:
        """Try the draw alone, then ask again for everything else that was under way."""
        waiting = [other for other in self._pending if other != draw]
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None
        with self._new_pool(1) as alone:
            try:
                with _deaf():
                    future = alone.submit(_run, draw)
                found = future.result()
            except BrokenProcessPool:
                reason = "the worker process died on this sample, twice (out of memory, or a crash in a decoder)"
                shard, key = self._encode.name_of(draw) if isinstance(self._encode, Naming) else ("", "")
                found = BadSample(draw, shard, key, reason)
        for other in waiting:
            self._pending[other] = self._submit(other)
        return found
