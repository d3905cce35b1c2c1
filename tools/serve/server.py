"""The process: a socket, one event loop, the model in a thread beside it, and an end that answers what was accepted.

bind --> answer 503 --> model is there --> answer --> SIGTERM: 503 to who comes, the others have `grace_s` --> end
                                                      a second one: end at once
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
import uvloop
from starlette.types import ASGIApp

from eval.engine import Engine
from models.common.errors import InputError
from tools.serve.service import Service

logger = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75
"""Longer than proxies keep a connection that is not used: who closes first must not be the server."""

_FLUSH_S = 3
"""How long the last bytes of answers have to reach their clients."""

SECOND_SIGNAL = 128


@dataclass(frozen=True)
class Steps:
    """What happens at the turns of the server's life.

    Args:
        open_engine: opens the model, in a thread of its own; the engine serves when it returns.
        when_ready: on the event loop, before the first answer.
        when_closing: at the first signal, before the engine drains.
        when_drained: when all that was accepted is answered or told so, before connections are closed.
        clean_up: at a second signal, before the process ends at once.
    """

    open_engine: Callable[[], Engine]
    when_ready: Callable[[Engine, AsyncExitStack], Awaitable[None]]
    when_closing: Callable[[], None]
    when_drained: Callable[[], Awaitable[None]]
    clean_up: Callable[[], None]


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        InputError: the port is taken, or the address is none of this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except socket.gaierror as error:
        raise InputError(f"--host {host}: no address of this machine: {error.strerror}") from error
    except OSError as error:
        raise InputError(f"--port {port} is taken on {host}, or not for this user: {error.strerror}") from error


class Server:
    """Serves one app over one engine.

    Args:
        app: what uvicorn calls.
        service: whose engine it opens and drains.
        steps: what happens on the way.
        root_path: under which a proxy serves it.
    """

    def __init__(self, app: ASGIApp, service: Service, steps: Steps, *, root_path: str = "") -> None:
        config = uvicorn.Config(
            app,
            http="h11",  # httptools loses the body of a request that offers HTTP/2, as those of Java's client do
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            root_path=root_path,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_FLUSH_S,
        )
        self._server, self._service, self._steps = _Quiet(config), service, steps
        self._stopped: asyncio.Event | None = None
        self._num_heard = 0

    def run(self, listener: socket.socket, *, hears_signals: bool = True) -> None:
        """Serve until SIGTERM or SIGINT, or `stop`.

        Raises:
            InputError: the model cannot be opened.
        """
        uvloop.run(self._run(listener, hears_signals))

    def stop(self) -> None:
        """Begin the end; on the event loop."""
        if self._stopped is not None:
            self._stopped.set()

    async def _run(self, listener: socket.socket, hears_signals: bool) -> None:
        self._stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT) if hears_signals else ():
            asyncio.get_running_loop().add_signal_handler(number, self._hear, number)
        opened = _in_daemon(self._steps.open_engine)
        async with AsyncExitStack() as held:
            serving = asyncio.ensure_future(self._server.serve(sockets=[listener]))
            stopped = asyncio.ensure_future(self._stopped.wait())
            try:
                first: list[asyncio.Future[Any]] = [opened, serving, stopped]
                await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
                if opened.done():
                    await self._begin(opened.result(), held)
                    await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
                await self._drain()
            finally:
                stopped.cancel()
                self._server.should_exit = True
                await serving

    async def _begin(self, engine: Engine, held: AsyncExitStack) -> None:
        await self._steps.when_ready(engine, held)
        self._service.engine = engine

    async def _drain(self) -> None:
        engine = self._service.engine
        if engine is None:
            return
        stats = engine.stats()
        logger.info(
            "closing: %d answers are written, %d wait; a second signal ends at once", stats.running, stats.waiting
        )
        self._steps.when_closing()
        await asyncio.to_thread(engine.drain, self._service.settings.times.grace_s)
        await asyncio.to_thread(engine.close)
        await self._steps.when_drained()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # pages that are open still are cut off

    def _hear(self, number: int) -> None:
        self._num_heard += 1
        self.stop()
        if self._num_heard > 1:
            self._steps.clean_up()
            os._exit(SECOND_SIGNAL + number)


class _Quiet(uvicorn.Server):
    """Leaves signals to us: uvicorn's own end does not wait for the engine."""

    @contextmanager
    def capture_signals(self) -> Any:
        """Capture none."""
        yield


def _in_daemon(work: Callable[[], Engine]) -> asyncio.Future[Engine]:
    """The work's result, from a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Engine] = loop.create_future()

    def run() -> None:
        try:
            result, error = work(), None
        except BaseException as raised:
            result, error = None, raised

        def tell() -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            elif result is not None:
                done.set_result(result)

        loop.call_soon_threadsafe(tell)

    threading.Thread(target=run, name="open", daemon=True).start()
    return done
