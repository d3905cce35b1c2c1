"""What `sightline serve` and `sightline demo` do with their command line."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import socket
import sys
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastapi import FastAPI

from eval.engine import Engine, EngineLimits
from models.bundle import find_manifest
from models.common.errors import InputError
from tools.serve.app import behind_gate, build_app
from tools.serve.arguments import settings_of
from tools.serve.gate import Gate
from tools.serve.images import find_examples
from tools.serve.keys import Keys
from tools.serve.lifetime import own_folder, remove
from tools.serve.server import Server, Steps, bind
from tools.serve.service import Service
from tools.serve.tunnel import share

if TYPE_CHECKING:
    from tools.serve.front import Front

_FIRST_PORT, _NUM_PORTS = 7860, 100


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it; the exit code.

    Raises:
        InputError: what the command line says cannot be done, or the bundle is damaged.
    """
    settings = settings_of(arguments)
    keys = Keys.read(arguments.api_keys) if arguments.api_keys is not None else Keys()
    find_manifest(arguments.bundle)
    listener = _listen(arguments.host, arguments.port)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    for name in ("httpx", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    service = Service(settings)
    app = build_app(service)
    gate = behind_gate(app, service, keys)
    with listener, own_folder() as folder:
        address = Address(arguments.host, listener.getsockname()[1])
        life = _Life(arguments, service=service, app=app, gate=gate, folder=folder, address=address)
        print(f"opening {arguments.bundle} …", file=sys.stderr, flush=True)
        steps = Steps(life.open, life.begin, life.close, life.told, lambda: remove(folder))
        root_path = "" if arguments.page else arguments.root_path  # Gradio has its own way with it
        Server(gate, service, steps, root_path=root_path).run(listener)
    return 0


class Address(NamedTuple):
    """Where the server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/"


class _Life:
    """The model, and the page where one is asked for."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        *,
        service: Service,
        app: FastAPI,
        gate: Gate,
        folder: Path,
        address: Address,
    ) -> None:
        self._arguments, self._service, self._app, self._gate = arguments, service, app, gate
        self._folder, self._address = folder, address
        self._front: Front | None = None

    def open(self) -> Engine:
        """Open the model, and build the page; not on the event loop."""
        from eval.predictor import Decoding, Predictor, Query, Turn

        arguments = self._arguments
        predictor = Predictor.open(arguments.bundle, device=arguments.device, verify=False)
        engine = Engine(predictor, _limits(arguments), after_step=self._service.after_step)
        engine.start()
        warm_up = Query((), (Turn("user", "Hello"),))
        "".join(engine.stream(warm_up, Decoding(max_new_tokens=2)))  # so that nobody waits for what comes once
        if arguments.page:
            from tools.serve.front import Front  # Gradio looks for its place for files when it is imported

            examples = find_examples(arguments.examples) if arguments.examples else []
            self._front = Front(
                self._service,
                engine,
                predictor,
                folder=self._folder,
                examples=examples,
                root_path=arguments.root_path,
            )
        gc.collect()
        gc.freeze()  # a million objects stay: later collections need not look at them, each of which stops every answer
        return engine

    async def begin(self, _: Engine, held: AsyncExitStack) -> None:
        """Say where it is; the page answers from now on."""
        if self._front is None:
            print(f"serving {self._service.settings.model} at {self._address}", flush=True)
            return
        await self._front.open(self._app, held)
        print(f"the page is at {self._address}", flush=True)
        if self._arguments.share:
            public = await asyncio.to_thread(share, *self._address)
            self._gate.allow(public)
            print(f"the page is also at {public}", flush=True)

    def close(self) -> None:
        """Let nobody in any more."""
        if self._front is not None:
            self._front.close()

    async def told(self) -> None:
        """Wait until the page's visitors have what they were told."""
        if self._front is not None:
            await self._front.told()


def _limits(arguments: argparse.Namespace) -> EngineLimits:
    cache_bytes = None if arguments.cache_gb is None else int(arguments.cache_gb * 1e9)
    return EngineLimits(rows=arguments.rows, waiting=arguments.waiting, cache_bytes=cache_bytes)


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket on the port, or on the first free one of the page's."""
    if port is not None:
        return bind(host, port)
    for each in range(_FIRST_PORT, _FIRST_PORT + _NUM_PORTS):
        with suppress(InputError):
            return bind(host, each)
    raise InputError(f"no port from {_FIRST_PORT} to {_FIRST_PORT + _NUM_PORTS - 1} is free on {host}: give --port")
