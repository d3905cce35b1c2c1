"""A server over a tiny random bundle, in this process: its address, its service, and what a client would send."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from eval.engine import Engine, EngineLimits
from eval.predictor import Predictor
from tests.support.bundles import image
from tests.support.patience import GUARD_S, wait_until
from tools.serve.app import behind_gate, build_app
from tools.serve.keys import Keys
from tools.serve.server import Server, Steps, bind
from tools.serve.service import Service
from tools.serve.settings import Settings

MODEL = "tiny"


@dataclass
class Running:
    """A server that runs, and what is inside of it."""

    host: str
    port: int
    service: Service
    engine: Engine
    predictor: Predictor

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def until_idle(self) -> None:
        """Wait until no request is in the engine."""
        deadline_s = time.monotonic() + GUARD_S
        while time.monotonic() < deadline_s:
            stats = self.engine.stats()
            if not stats.running and not stats.waiting:
                return
            time.sleep(0.02)
        raise AssertionError(f"{self.engine.stats()}")


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Settings with other values; each is found by its name, which stands in one group alone."""
    groups = [part.name for part in fields(settings) if is_dataclass(getattr(settings, part.name))]
    for name, value in changes.items():
        (group,) = (group for group in groups if hasattr(getattr(settings, group), name))
        settings = replace(settings, **{group: replace(getattr(settings, group), **{name: value})})
    return settings


@contextmanager
def running_server(
    predictor: Predictor,
    *,
    keys: Keys | None = None,
    page: Path | None = None,
    examples: Sequence[Path] = (),
    root_path: str = "",
    **changes: Any,
) -> Iterator[Running]:
    """Serve `predictor` by a thread of this process.

    Args:
        page: where the page, if there is to be one, keeps what visitors send.
        changes: those of the settings.
    """
    settings = changed(Settings(model=MODEL), {"grace_s": 0.5, **changes})
    service = Service(settings)
    limits = EngineLimits(rows=settings.load.rows, waiting=settings.load.waiting)
    engine = Engine(predictor, limits, after_step=service.after_step)
    app = build_app(service)
    loops: list[asyncio.AbstractEventLoop] = []
    ready = threading.Event()
    fronts: list[Any] = []

    def open_engine() -> Engine:
        engine.start()
        wait_until("the engine serves", lambda: engine.state == "serving")
        if page is not None:
            from tools.serve.front import Front

            fronts.append(Front(service, engine, predictor, folder=page, examples=examples, root_path=root_path))
        return engine

    async def when_ready(_: Engine, held: AsyncExitStack) -> None:
        loops.append(asyncio.get_running_loop())
        for front in fronts:
            await front.open(app, held)
        asyncio.get_running_loop().call_soon(ready.set)

    def close() -> None:
        for front in fronts:
            front.close()

    async def told() -> None:
        for front in fronts:
            await front.told()

    steps = Steps(open_engine, when_ready, close, told, lambda: None)
    server = Server(behind_gate(app, service, keys or Keys()), service, steps)
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=lambda: server.run(listener, hears_signals=False), daemon=True)
        thread.start()
        assert ready.wait(10 * GUARD_S)
        try:
            yield Running("127.0.0.1", listener.getsockname()[1], service, engine, predictor)
        finally:
            loops[0].call_soon_threadsafe(server.stop)
            thread.join(GUARD_S)
            assert not thread.is_alive()


@contextmanager
def slow_steps(server: Running, seconds: float) -> Iterator[None]:
    """Let each step of the model take time, as with a real one."""
    model = server.predictor.model
    before = model.forward

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return before(*arguments, **options)

    model.forward = slow
    try:
        yield
    finally:
        model.forward = before


def file_of(picture: Image.Image | None = None, kind: str = "PNG") -> bytes:
    """A picture as a file."""
    stream = io.BytesIO()
    (picture or image("circle")).save(stream, kind)
    return stream.getvalue()


def data_url(file: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def picture_part(file: bytes | None = None, kind: str = "png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(file_of() if file is None else file, kind)}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def asking(*content: dict[str, Any] | str, **more: Any) -> dict[str, Any]:
    """The body of a chat completion with one user turn."""
    parts = [text_part(part) if isinstance(part, str) else part for part in content]
    return {"model": MODEL, "messages": [{"role": "user", "content": parts}], "max_tokens": 12, **more}


@contextmanager
def stuck_after(server: Running, steps: int) -> Iterator[threading.Event]:
    """Let the model stand still after so many steps, and choose no end token, until the event is set."""
    model, goes_on, left = server.predictor.model, threading.Event(), iter(range(steps))
    before = model.forward

    def stuck(*arguments: Any, **options: Any) -> Any:
        if next(left, None) is None:
            goes_on.wait(GUARD_S)
        output = before(*arguments, **options)
        if not goes_on.is_set():
            output.logits[..., list(server.predictor.end_ids)] = -math.inf
        return output

    model.forward = stuck
    try:
        yield goes_on
    finally:
        goes_on.set()
        model.forward = before
