"""Bundles are opened in one place, and nothing that is loaded may bring code with it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import REPOSITORY

LOADERS = ("from_pretrained", "from_config")
WITHOUT_CODE = ("AutoHfQuantizer.", "PeftModel.")
"""Classes whose loading runs no code of a directory, and has no such argument."""
OF_BUNDLES = {"AutoModelForImageTextToText", "AutoProcessor"}
ONE_PLACE = {"models/opening.py", "models/registered.py"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in ("models", "data_pipeline", "eval", "trainer", "tools"):
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            yield str(file.relative_to(REPOSITORY)), ast.parse(file.read_text(encoding="utf-8"))


def test_every_loading_call_refuses_code() -> None:
    num_calls = 0
    for file, tree in sources():
        for call in ast.walk(tree):
            is_load = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in LOADERS
            if not is_load or ast.unparse(call.func).startswith(WITHOUT_CODE):
                continue
            num_calls += 1
            words = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert words.get("trust_remote_code") == "False", f"{file}:{call.lineno}: {ast.unparse(call)}"
    assert num_calls > 8


def test_no_other_module_opens_bundles() -> None:
    found = {
        file
        for file, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and OF_BUNDLES & {alias.name for alias in node.names}
    }
    assert found == ONE_PLACE
    assert all((REPOSITORY / Path(file)).is_file() for file in ONE_PLACE)
