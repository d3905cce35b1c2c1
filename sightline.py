"""The API for users of a bundle, in one import.

    import sightline
    model = sightline.load("runs/quickstart/bundle")
    print(model.chat("photo.jpg", "What is in the image?"))

The names below are loaded when they are first used, so that the import itself is quick. Bundles with a class of our own
(`models.registered`) open by `load`, and by transformers' Auto classes after `sightline.register()`.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from sightline_packages import VERSION

if TYPE_CHECKING:
    from eval.predictor import Decoding, Predictor, Query, Turn
    from models.common.errors import InputError

__all__ = ["Decoding", "InputError", "Predictor", "Query", "Turn", "load", "register"]

__version__ = VERSION

_HOMES = {
    "Decoding": "eval.predictor",
    "InputError": "models.common.errors",
    "Predictor": "eval.predictor",
    "Query": "eval.predictor",
    "Turn": "eval.predictor",
}


def load(path: str | PathLike[str], *, device: str = "auto", verify: bool = True, num_answers: int = 0) -> Predictor:
    """Open the bundle at `path`; see `Predictor.open`. Raises InputError where it is missing or damaged."""
    from eval.predictor import Predictor

    return Predictor.open(path, device=device, verify=verify, num_answers=num_answers)


def register() -> None:
    """Make the classes of our bundles known to transformers, whose Auto classes then open them; `load` does so itself.

    Bundles of stock classes need none of it. Imports transformers.
    """
    from models.registered import register as register_classes

    register_classes()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sightline' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
