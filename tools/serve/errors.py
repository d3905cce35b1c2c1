"""What the server refuses or cannot do, as an HTTP answer in the shape of OpenAI's API.

    {"error": {"message": …, "type": …, "param": … | null, "code": … | null}}

Source: https://platform.openai.com/docs/guides/error-codes; its clients send 408, 409, 429 and 5xx again unless
`x-should-retry` is false, and wait as long as `Retry-After` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from models.common.errors import single_line

_TYPES = {401: "authentication_error", 403: "permission_error", 409: "conflict_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: one line, for the client.
        code: a word that programs can compare.
        param: the field of the request that is at fault.
        retry_after_s: when to ask again; None where asking again does not help.
        reason: under which metrics count it, where it is the server's load that refuses.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        reason: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.reason = reason
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(math.ceil(retry_after_s), 1))
        elif status >= 500:
            self.headers["x-should-retry"] = "false"

    def body(self) -> dict[str, Any]:
        """The JSON of the answer, and of the chunk that ends a stream."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that would be refused each time."""
    return ApiError(400, message, param=param, code=code)


def of_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request's fields."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = [str(part) for part in first["loc"]]
    message = single_line(ValueError(first["msg"]))
    if not place:
        return invalid(f"the body is not what this address takes: {message}", code=str(first["type"]))
    return invalid(f"{'.'.join(place)}: {message}", place[0], str(first["type"]))
