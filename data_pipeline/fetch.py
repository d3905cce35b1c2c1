"""Runs the encoder on references to samples, in worker processes or inline, and hands results back by reference.

Owns the process pool. Workers are stateless functions reference -> sample: how many there are, and which one took a
reference, changes nothing but the time it takes.

A job's signals (Slurm's scancel and time limit, Ctrl-C) reach each of its processes. Only the main process handles
them: it saves, and ends its workers. Workers ignore them from their first instruction on, and end when the main process
is gone.
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

from data_pipeline.sample import BadSample, Encoded, SampleRef
from models.common.cores import unbound

Result = Encoded | BadSample
Encode = Callable[[SampleRef], Result]


RUN_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that ask a run to stop."""

_encode: Encode | None = None  # a worker's own copy, set once by `_start_worker`


def _start_worker(encode: Encode, parent: int) -> None:
    """Ignore signals, which the main process handles, and watch for its end."""
    global _encode  # noqa: PLW0603 - the executor offers no other place for a worker's own value
    _encode = encode
    for ignored in RUN_SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: int) -> None:
    """End this process once its parent is gone: an executor's worker would wait for work without end."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run(ref: SampleRef) -> Result:
    assert _encode is not None
    return _encode(ref)


class _Worker(SpawnProcess):
    """A worker process. A pool that breaks ends the others by `terminate`, whose SIGTERM they ignore."""

    def terminate(self) -> None:
        """Send SIGKILL instead."""
        self.kill()


class _Workers(SpawnContext):
    """Workers are spawned, not forked: forking a process that holds CUDA or threads is not safe."""

    Process = _Worker


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started inside (workers, and the resource tracker of multiprocessing) inherit blocked RUN_SIGNALS.

    They inherit all of this process's cores, too. A signal to this process waits for the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
    try:
        with unbound():
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Fetcher:
    """Encodes samples by reference, ahead of time where there are workers. Processes start with the first request.

    A worker that dies (killed for memory, or crashed in a decoder) breaks its pool: a new pool is made and what was
    pending is submitted again. A sample that is alone in a new pool when that breaks is the cause and is returned as a
    `BadSample`.
    """

    def __init__(self, encode: Encode, num_workers: int) -> None:
        self._encode = encode
        self.num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None
        self._pending: dict[SampleRef, Future[Result]] = {}

    def prefetch(self, ref: SampleRef) -> None:
        """Start encoding a sample; without workers this does nothing."""
        if self.num_workers and ref not in self._pending:
            self._pending[ref] = self._submit(ref)

    def result(self, ref: SampleRef) -> Result:
        """The encoded sample, or a `BadSample`; waits for the worker."""
        if not self.num_workers:
            return self._encode(ref)
        self.prefetch(ref)
        try:
            found = self._pending[ref].result()
        except BrokenProcessPool:
            found = self._retry_alone(ref)
        del self._pending[ref]
        return found

    def forget(self) -> None:
        """Cancel every pending request."""
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()

    def close(self) -> None:
        """End the workers."""
        self.forget()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _submit(self, ref: SampleRef) -> Future[Result]:
        if self._pool is None:
            self._pool = self._new_pool(self.num_workers)
        try:
            with _signals_blocked():  # the executor starts a process where none is idle
                return self._pool.submit(_run, ref)
        except BrokenProcessPool:
            broken: Future[Result] = Future()
            broken.set_exception(BrokenProcessPool("the pool broke before this sample was taken"))
            return broken

    def _new_pool(self, num_workers: int) -> ProcessPoolExecutor:
        with _signals_blocked():
            return ProcessPoolExecutor(
                num_workers,
                mp_context=_Workers(),
                initializer=_start_worker,
                initargs=(self._encode, os.getpid()),
            )

    def _retry_alone(self, ref: SampleRef) -> Result:
        """Encode the sample in a pool of one, then submit again whatever else was pending."""
        waiting = [other for other in self._pending if other != ref]
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None
        with self._new_pool(1) as alone:
            try:
                with _signals_blocked():
                    future = alone.submit(_run, ref)
                found = future.result()
            except BrokenProcessPool:
                reason = "the worker process died on this sample, twice (out of memory, or a crash in a decoder)"
                found = BadSample(ref, reason)
        for other in waiting:
            self._pending[other] = self._submit(other)
        return found
