"""The real-photo chain: a Llama-like tokenizer keeps its ids through a bundle, and the page's commands are commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from eval import run as evaluation
from models.bundle import verify
from tests.support.backbones import make_clip, make_language, tiny_recipe
from tests.support.checkpoints import write_finished
from tests.support.paths import REPOSITORY
from tools.merge import main as merge_main
from tools.toy.llama2c import build_tokenizer
from trainer.recipe import load_recipe

LINE_FEED_ID = 3 + ord("\n")
PAGE = REPOSITORY / "docs" / "benchmarks.md"


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


def commands() -> list[list[str]]:
    """Every command of the section, as words."""
    section = PAGE.read_text(encoding="utf-8").split("## Real photos")[1].split("\n## ")[0]
    block = section.split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]


def test_the_pages_commands_fit_the_recipe_and_the_parsers() -> None:
    recipe = load_recipe(REPOSITORY / "recipes" / "coco_stories.yaml")
    made = {word for words in commands() for word in words}
    for path in (recipe.model.vision.path, recipe.model.language.path):  # type: ignore[union-attr]
        assert path in made
    sources = {str(source.path) for stage in recipe.stages.values() for source in stage.data.sources}
    assert sources <= made
    scored = [words[3:] for words in commands() if words[:3] == ["python", "-m", "eval.run"]]
    assert scored
    for words in scored:
        parsed = evaluation._parser().parse_args(words)
        assert parsed.suite is not None or evaluation._single_config(parsed)
    trained = [words for words in commands() if words[0] == "deepspeed"]
    assert [words[-1] for words in trained] == list(recipe.stages)
