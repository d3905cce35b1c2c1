"""The Gradio page on the server's own app: one port, one gate, one engine.

Mounted while the server runs already, when the model is there: the page shows facts about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data_pipeline import limits
from tools.serve.body import TooLargeError
from tools.serve.gate import API_PATHS
from tools.serve.style import CSS, theme

if TYPE_CHECKING:
    from tools.serve.page import Page


def page_app(page: Page, examples: Sequence[Path], root_path: str) -> FastAPI:
    """An app of the page alone; takes a second or two."""
    app = FastAPI(openapi_url=None)
    # Gradio looks at where an upload's path leads only in pages that it has launched itself: unlike here, any file of
    # the server would be taken for an upload (processing_utils._check_allowed).
    page.blocks.has_launched = page.blocks.is_running = True
    return gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        theme=theme(),
        css=CSS,
        max_file_size=limits.MAX_BYTES,
        footer_links=["api"],
        ssr_mode=False,
        run_history=False,
        root_path=root_path or None,
        allowed_paths=[str(path) for path in examples],
    )


async def mount(app: FastAPI, page: FastAPI, held: AsyncExitStack, *, max_body_bytes: int) -> None:
    """Put the page behind all of the app's own addresses, and start it."""
    await held.enter_async_context(page.router.lifespan_context(page))
    app.router.routes.append(Mount("/", _PageOnly(page, list(app.routes), max_body_bytes)))


class _PageOnly:
    """The page, for what is not the API's: there an unknown address or method is the API's to refuse."""

    def __init__(self, page: ASGIApp, routes: Sequence[BaseRoute], max_body_bytes: int) -> None:
        self._page, self._routes, self._max_body_bytes = page, routes, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if any(route.matches(scope)[0] == Match.PARTIAL for route in self._routes):
            raise HTTPException(405)
        if scope["path"].startswith(API_PATHS):
            raise HTTPException(404)
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            raise TooLargeError(self._max_body_bytes)
        await self._page(scope, self._bounded(receive), send)

    def _bounded(self, receive: Receive) -> Receive:
        """Count a body that comes in chunks, of which nobody knows the length."""
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise TooLargeError(self._max_body_bytes)
            return message

        return counted
