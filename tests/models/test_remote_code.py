"""Code that lies in a model directory never runs, whatever a person types."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from models.common.errors import InputError
from models.opening import open_config, open_model, open_processor
from tests.support.bundles import make_bundle
from tests.support.paths import REPOSITORY

PACKAGES = ("data_pipeline", "eval", "models", "tools", "trainer")


def loading_calls() -> list[tuple[str, ast.Call]]:
    """Every call by which transformers' Auto classes read a directory or build from its configuration."""
    found = []
    for file in (file for package in PACKAGES for file in sorted((REPOSITORY / package).rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            is_auto = isinstance(node.func.value, ast.Name) and node.func.value.id.startswith("Auto")
            if is_auto and node.func.attr in ("from_pretrained", "from_config"):
                found.append((f"{file.relative_to(REPOSITORY)}:{node.lineno}", node))
    return found


def test_every_loading_call_says_that_no_code_is_trusted() -> None:
    calls = {place: call for place, call in loading_calls() if "AutoHfQuantizer" not in ast.unparse(call)}
    assert len(calls) > 5
    for place, call in calls.items():
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert words.get("trust_remote_code") == "False", place


@pytest.mark.parametrize("where", ["config", "processor", "tokenizer"])
def test_a_bundles_own_code_is_not_run_when_a_person_says_yes(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    file = {"config": "config.json", "processor": "processor_config.json", "tokenizer": "tokenizer_config.json"}[where]
    value = json.loads((bundle / file).read_text())
    if where == "config":
        value["model_type"] = "evil"
    autos = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    value["auto_map"] = dict.fromkeys(autos, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (bundle / file).write_text(json.dumps(value))
    import torch

    for opened in (open_config, open_processor, lambda folder: open_model(folder, torch.device("cpu"))):
        try:
            opened(bundle)
        except InputError:
            continue
    assert not (tmp_path / "ran").exists()
