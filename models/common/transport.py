"""What an error of a transport means: every one, of any client, is tried again or is one line for a person.

    answers no other try changes   a status 4xx, no such file, no permission, no client for this address
    all else                       cut bodies and status lines, timeouts, names that do not resolve, 5xx, a client's own

Clients (urllib, http.client, httpx, botocore, pyarrow, whatever fsspec brings) share no kind of exception, so what is
not known to be final is tried again.
"""

from __future__ import annotations

from http import HTTPStatus

from models.common.errors import InputError

_PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
_FINAL = (InputError, ImportError, FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)


def is_final(error: Exception) -> bool:
    """Whether another try would fail in the same way."""
    status = _status_of(error)
    if status is not None:
        return HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in _PASSING
    return isinstance(error, _FINAL) or (type(error) is ValueError and "rotocol" in str(error))


def _status_of(error: Exception) -> int | None:
    """The HTTP status that an error tells, under the names that clients have for it."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("code", "status", "status_code"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return None
