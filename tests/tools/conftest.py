"""A tiny finished run and its bundle, which the tests of merging, quantizing and opening share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.common.errors import run_cli
from tests.support.backbones import make_clip, make_language, tiny_recipe
from tests.support.checkpoints import write_finished
from tools.export.merge import main as merge_main


def run_of(
    folder: Path, *, language: str = "llama", tied: bool = False, projector: str = "mlp", width: int = 64
) -> dict[str, Any]:
    """The recipe of a run that is not trained; at a `width` of 64 NF4 can hold every layer of its language model."""
    make_clip(folder / "vision")
    make_language(folder / "language", language, tied=tied, width=width)
    recipe = tiny_recipe(folder, folder / "shards")
    recipe["model"]["projector"] = {"kind": projector}
    recipe["stages"]["lora"]["init"] = None
    return recipe


def merge(recipe: dict[str, Any], out: Path, *words: str) -> int:
    return run_cli(merge_main, [recipe["run"], str(out), "--stage", "lora", *words])


def beside(recipe: dict[str, Any], name: str) -> Path:
    return Path(recipe["run"]).parent / name


def finished(folder: Path, precision: str) -> dict[str, Any]:
    recipe = run_of(folder)
    recipe["stages"]["lora"]["engine"]["precision"] = precision
    write_finished(recipe, "lora")
    assert merge(recipe, folder / "bundle") == 0
    return recipe


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe of a finished run; its bundle is `beside(trained, "bundle")`."""
    return finished(tmp_path_factory.mktemp("merge"), "fp32")


@pytest.fixture(scope="session")
def trained_in_bf16(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same in bf16, of a base in fp32."""
    return finished(tmp_path_factory.mktemp("merge"), "bf16")


@pytest.fixture(scope="session", params=["trained", "trained_in_bf16"], ids=["fp32", "bf16"])
def trained_in_any(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The one and the other, for tests that hold in both."""
    found: dict[str, Any] = request.getfixturevalue(request.param)
    return found
