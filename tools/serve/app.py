"""The app: every address, errors in one shape, and the gate around it.

Gate --> /v1/… (openai_api)   /caption /question /chat (rest_api)   /health /metrics /docs   the page
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from tools.serve.conversations import Conversations
from tools.serve.errors import ApiError
from tools.serve.gate import Gate, visit_of
from tools.serve.keys import Keys
from tools.serve.openai_api import openai_api
from tools.serve.reference import reference_page
from tools.serve.responses import ClientGoneError
from tools.serve.rest_api import rest_api
from tools.serve.service import Service

_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def build_app(service: Service) -> FastAPI:
    """The app of one service; `behind_gate` completes it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.open():
            yield

    app = FastAPI(
        title="Sightline",
        description=f"Serves {service.settings.model}.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(openai_api(service))
    app.include_router(rest_api(service, Conversations()))

    @app.get("/health", tags=["Operation"], summary="Whether it can answer", response_model=None)
    async def health() -> Response:
        status = 200 if service.state == "serving" else 503
        headers = {} if status == 200 else {"Retry-After": "5"}
        return JSONResponse(_health(service), status, headers)

    @app.get("/metrics", tags=["Operation"], summary="Figures for Prometheus", response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=_PROMETHEUS)

    @app.get("/docs", include_in_schema=False, response_model=None)
    async def reference(request: Request) -> Response:
        path = request.scope.get("root_path", "").rstrip("/")
        return HTMLResponse(reference_page(app.openapi(), f"{path}/openapi.json"))

    app.exception_handler(ApiError)(_refused(service))
    app.exception_handler(HTTPException)(_not_there)
    app.exception_handler(ClientGoneError)(_gone)
    app.exception_handler(Exception)(_bug)
    return app


def behind_gate(app: FastAPI, service: Service, keys: Keys) -> Gate:
    """What uvicorn serves."""
    return Gate(app, keys, service.settings.access, service.metrics.visited)


def _health(service: Service) -> dict[str, Any]:
    stats = service.engine.stats() if service.engine is not None else None
    return {
        "status": service.state,
        "model": service.settings.model,
        "running": stats.running if stats is not None else 0,
        "waiting": stats.waiting if stats is not None else 0,
    }


def _refused(service: Service) -> Any:
    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        if error.reason:
            service.metrics.rejected(error.reason)
        return error.response()

    return refuse


async def _not_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {404: f"there is nothing at {request.url.path[:100]}", 405: f"{request.method} is not for this address"}
    headers = dict(error.headers or {})
    return ApiError(error.status_code, texts.get(error.status_code, str(error.detail)), headers=headers).response()


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


async def _bug(request: Request, _: Exception) -> Response:
    """The answer to a bug of ours; the gate logs it, and keeps the connection."""
    request_id = visit_of(request.scope).request_id
    text = f"something went wrong here; the server's log says more under {request_id}"
    return ApiError(500, text, code="internal_error").response()
