"""The page in front of a running server: built beside the event loop, opened on it, and swept."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from fastapi import FastAPI

from eval.engine import Engine
from eval.predictor import Predictor
from tools.serve.asking import EngineAsker
from tools.serve.lifetime import forget_old
from tools.serve.mounted import mount, page_app
from tools.serve.page import Page
from tools.serve.service import Service

_SWEEP_S = 60.0
_TOLD_S = 3.0
"""How long what ended at the end has, to reach its visitors."""
_LOOK_S = 0.1


class Front:
    """One page over one engine.

    Args:
        service: whose budget and limits the page shares.
        engine: answers.
        predictor: whose facts it shows.
        folder: for what visitors send.
        examples: images that are offered.
        root_path: under which a proxy serves it.
    """

    def __init__(
        self,
        service: Service,
        engine: Engine,
        predictor: Predictor,
        *,
        folder: Path,
        examples: Sequence[Path],
        root_path: str,
    ) -> None:
        settings = service.settings
        asker = EngineAsker(engine, service.pictures, settings.times.queue_s)
        self._folder, self._max_body_bytes = folder, settings.limits.max_body_bytes
        self._page = Page(predictor, folder, examples, asker=asker, rows=settings.load.rows)
        self._app = page_app(self._page, examples, root_path)

    async def open(self, app: FastAPI, held: AsyncExitStack) -> None:
        """Let visitors in, until `held` ends."""
        await mount(app, self._app, held, max_body_bytes=self._max_body_bytes)
        sweeping = asyncio.ensure_future(self._sweep())
        held.callback(sweeping.cancel)

    def close(self) -> None:
        """Let nobody in, and tell those who wait; what is being answered goes on."""
        self._page.waiting.close_doors()

    async def told(self) -> None:
        """Wait until visitors have what they were told, or too long."""
        deadline_s = asyncio.get_running_loop().time() + _TOLD_S
        self._page.blocks.is_running = False  # what tells Gradio's browsers that it is there ends
        was_here = self._page.waiting.num_here
        while self._page.waiting.num_here and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(_LOOK_S)
        if was_here:
            await asyncio.sleep(5 * _LOOK_S)  # the last messages are on their way

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            with suppress(OSError):
                await asyncio.to_thread(forget_old, self._folder)
