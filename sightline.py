"""What a user of a bundle needs, in one import.

    import sightline
    model = sightline.load("runs/quickstart/bundle")
    print(model.chat("photo.jpg", "What is in the picture?"))

The names below are loaded when they are first used, so that the import itself is quick.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.predictor import Decoding, Predictor, Query, Turn
    from models.errors import InputError

__all__ = ["Decoding", "InputError", "Predictor", "Query", "Turn", "load"]

_HOMES = {
    "Decoding": "eval.predictor",
    "InputError": "models.errors",
    "Predictor": "eval.predictor",
    "Query": "eval.predictor",
    "Turn": "eval.predictor",
}


def load(path: str | PathLike[str], *, device: str = "auto", verify: bool = True) -> Predictor:
    """Open the bundle at `path`; see `Predictor.open`. Raises InputError where it is missing or damaged."""
    from eval.predictor import Predictor

    return Predictor.open(path, device=device, verify=verify)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sightline' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
