"""The answers that are being written on the page, one for each visitor, so that what else he does there can end them.

Stop, the trash, another image and a tab that is closed come from elsewhere than the answer, and the answer tells the
page of its end itself: what it says last is what stays, whichever of two messages a browser gets first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from models.common.errors import InputError
from tools.serve.chat import Cancel


class Running:
    """The answer of each session of the page. Thread-safe."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[str | None, Cancel]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def written(self, session: str, image: str | None, cancel: Cancel) -> Iterator[None]:
        """An answer about an image is written within the block; `cancel` is what ends it.

        Raises:
            InputError: another one of the session is being written.
        """
        with self._lock:
            if session in self._answers:
                raise InputError("an answer is being written: wait for its end, or stop it")
            self._answers[session] = image, cancel
        try:
            yield
        finally:
            with self._lock:
                del self._answers[session]

    def stop(self, session: str) -> None:
        """End a session's answer where it is."""
        with self._lock:
            if session in self._answers:
                self._answers[session][1].set()

    def drop(self, session: str, *, but_about: str | None = "") -> None:
        """End a session's answer and take its chat away, unless it is about this image (None: about no image)."""
        with self._lock:
            image, cancel = self._answers.get(session, (but_about, None))
            if cancel is not None and image != but_about:
                cancel.drop()
