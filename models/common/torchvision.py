"""Whether the torchvision of this environment works, where there is one. Nothing of this project needs it.

Transformers imports it wherever it is installed. One that was built for another torch (PyPI's wheels for Linux are for
CUDA, and fail beside a CPU's torch) then fails inside transformers, which names only the class that it did not import.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from models.common.errors import InputError, single_line


def check_torchvision() -> None:
    """Raises InputError where torchvision is installed and cannot be imported."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except Exception as error:  # RuntimeError of a missing operator, OSError of a library, ImportError
        found = f"torchvision {version('torchvision')} does not work with torch {version('torch')}"
        advice = "install the one that goes with it, or take it away: pip uninstall torchvision"
        raise InputError(f"{found} ({single_line(error)}); {advice}") from error
