"""A bundle with a tokenizer like Llama's, which puts <s> before every text and knows a line feed as a byte alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.bundle import verify
from tests.support.backbones import make_clip, make_language, tiny_recipe
from tests.support.checkpoints import write_finished
from tools.examples.synthetic.llama2c import build_tokenizer
from tools.export.merge import main as merge_main

LINE_FEED_ID = 3 + ord("\n")


def llama_like_recipe(folder: Path, template: str) -> dict[str, Any]:
    """A tiny recipe whose tokenizer puts <s> before every text and knows a line feed only as a byte."""
    make_clip(folder / "vision")
    make_language(folder / "language")
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = build_tokenizer([(word, 0.0) for word in words], max_positions=512)
    tokenizer.save_pretrained(folder / "language")
    recipe = tiny_recipe(folder, folder / "shards")
    for stage in recipe["stages"].values():
        stage["data"]["template"] = {"kind": template}
    recipe["stages"]["lora"]["init"] = None
    return recipe


@pytest.mark.parametrize(("template", "ends"), [("plain", {2, LINE_FEED_ID}), ("vicuna_v1", {2})])
def test_a_bundle_begins_once_and_ends_where_training_ends(template: str, ends: set[int], tmp_path: Path) -> None:
    recipe = llama_like_recipe(tmp_path, template)
    write_finished(recipe, "lora")
    assert merge_main([recipe["run"], "--stage", "lora", "--out", str(tmp_path / "bundle")]) == 0
    manifest = verify(tmp_path / "bundle")
    assert manifest.parity.passed
    generation = json.loads((tmp_path / "bundle" / "generation_config.json").read_text())
    found = generation["eos_token_id"]
    assert (set(found) if isinstance(found, list) else {found}) == ends
