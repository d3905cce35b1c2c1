"""Files that belong to the program and are no code: DeepSpeed's settings and the recipes.

In a checkout they lie beside the packages, where people look for them; installed, they lie in the package `trainer`
(setup.py puts them there), which is where they are found from any directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(folder: Literal["ds_configs", "recipes"]) -> Path:
    """The directory of that name."""
    installed = _PACKAGE / folder
    return installed if installed.is_dir() else _PACKAGE.parent / folder


def find_recipe(file: Path) -> Path:
    """`file`, or where there is none the recipe that we ship under its name: `recipes/X.yaml` from any directory."""
    if file.is_file() or file.parent not in (Path("recipes"), Path()):
        return file
    ours = shipped("recipes") / file.name
    return ours if ours.is_file() else file
