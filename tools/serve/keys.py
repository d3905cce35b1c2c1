"""API keys: a file of names and secrets, and who a request comes from.

    # NAME KEY, one a line
    alice 3f1c…
    prometheus 9b77…

A key is kept as its SHA-256 and compared with every other in constant time, so that neither the time of an answer nor
the process's memory tells a part of one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path

from models.common.errors import InputError

_SHORTEST = 16


class Keys:
    """The keys that are let in; without any, everybody is."""

    def __init__(self, digests: Mapping[str, bytes] | None = None) -> None:
        self._digests = dict(digests or {})

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Read a file of keys.

        Raises:
            InputError: a line that is not a name and a key, a short key, a name or a key that is there twice.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
            raise InputError(f"--api-keys {path} is no file of text: write NAME KEY, one a line") from error
        digests: dict[str, bytes] = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            where = f"{path}, line {number}"
            if len(words) != 2:
                raise InputError(f"{where}: write NAME KEY, with white space between them alone")
            name, digest = words[0], _digest(words[1])
            if len(words[1]) < _SHORTEST:
                raise InputError(
                    f"{where}: the key has fewer than {_SHORTEST} characters; `openssl rand -hex 24` is one"
                )
            if name in digests or digest in digests.values():
                raise InputError(f"{where}: this name or key is there already")
            digests[name] = digest
        if not digests:
            raise InputError(f"{path} holds no key: write NAME KEY, one a line")
        return cls(digests)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def name_of(self, authorization: str, *, basic: bool) -> str | None:
        """Whose key an `Authorization` header brings; None for none.

        Args:
            basic: whether a browser's user name and password will do, of which the password is the key.
        """
        scheme, _, value = authorization.strip().partition(" ")
        if scheme.lower() == "bearer":
            return self._owner(value.strip())
        if scheme.lower() == "basic" and basic:
            try:
                pair = base64.b64decode(value.strip(), validate=True).decode("utf-8")
            except (binascii.Error, ValueError):
                return None
            return self._owner(pair.partition(":")[2])
        return None

    def _owner(self, key: str) -> str | None:
        given, found = _digest(key), None
        for name, digest in self._digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
