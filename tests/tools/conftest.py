"""A tiny finished run and its bundle, which the tests of merging, quantizing and opening share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.errors import run_cli
from tests.support.backbones import make_clip, make_language, tiny_recipe
from tests.support.checkpoints import write_finished
from tools.merge import main as merge_main


def run_of(folder: Path, *, language: str = "llama", tied: bool = False, projector: str = "mlp") -> dict[str, Any]:
    make_clip(folder / "vision")
    make_language(folder / "language", language, tied=tied)
    recipe = tiny_recipe(folder, folder / "shards")
    recipe["model"]["projector"] = {"kind": projector}
    recipe["stages"]["lora"]["init"] = None
    return recipe


def merge(recipe: dict[str, Any], out: Path, *words: str) -> int:
    return run_cli(merge_main, [recipe["run"], str(out), "--stage", "lora", *words])


def beside(recipe: dict[str, Any], name: str) -> Path:
    return Path(recipe["run"]).parent / name


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe of a finished run; its bundle is `beside(trained, "bundle")`."""
    folder = tmp_path_factory.mktemp("merge")
    recipe = run_of(folder)
    write_finished(recipe, "lora")
    assert merge(recipe, folder / "bundle") == 0
    return recipe
