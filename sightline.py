"""What a user of a bundle needs, in one import.

    import sightline
    model = sightline.load("runs/quickstart/bundle")
    print(model.chat("photo.jpg", "What is in the picture?"))

The names below are loaded when they are first used, so that the import itself is quick. Once transformers is imported,
its Auto classes open every bundle, those with our own class (`models.registered`) among them.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
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


def load(path: str | PathLike[str], *, device: str = "auto", verify: bool = True, num_answers: int = 0) -> Predictor:
    """Open the bundle at `path`; see `Predictor.open`. Raises InputError where it is missing or damaged."""
    from eval.predictor import Predictor

    return Predictor.open(path, device=device, verify=verify, num_answers=num_answers)


class _AfterTransformers(MetaPathFinder, Loader):
    """Registers our class with transformers when somebody imports it, and not before."""

    def __init__(self) -> None:
        self._own: Any = None

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Stand between once, when transformers itself is asked for."""
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None:
            self._own, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> Any:
        """As transformers' own loader makes it."""
        return self._own.create_module(spec)

    def exec_module(self, module: Any) -> None:
        """Run transformers, then register."""
        module.__spec__.loader = module.__loader__ = self._own
        self._own.exec_module(module)
        _register()


class _AfterOurs(MetaPathFinder):
    """Registers at the first import after our own modules, one of which brought transformers in, are whole."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Stand between until then; finds nothing itself."""
        if not _are_ours_partial():
            sys.meta_path.remove(self)
            _register()


def _are_ours_partial() -> bool:
    ours = [module for name, module in list(sys.modules.items()) if name.startswith("models.")]
    return any(getattr(module.__spec__, "_initializing", False) for module in ours)


def _register() -> None:
    if _are_ours_partial():
        sys.meta_path.insert(0, _AfterOurs())
    else:
        import models.registered  # noqa: F401


if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterTransformers())


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sightline' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
