"""Where tests find real data that is not part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

_folder = Path(os.environ.get("SIGHTLINE_DATA", REPOSITORY.parent / "shared" / "data"))
DATA: Path | None = _folder if _folder.is_dir() else None

needs_data = pytest.mark.skipif(DATA is None, reason="no real data: set SIGHTLINE_DATA to the folder that holds it")


def data(*parts: str) -> Path:
    """A path inside the real data; only call it under `needs_data`."""
    assert DATA is not None
    return DATA.joinpath(*parts)
