"""docs/native.md: its commands, run as they stand on a tiny model of the same classes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sightline
from tests.support.bundles import image
from tests.support.paths import REPOSITORY
from tests.support.patience import GUARD_S
from tests.support.published import make_published

PAGE = (REPOSITORY / "docs" / "native.md").read_text(encoding="utf-8")
RECIPE = "recipes/qwen3vl_4b.yaml"
TINY = {
    "Qwen/Qwen3-VL-4B-Instruct": "published",
    "max_image_tokens: 576": "max_image_tokens: 16",
    "count: 1}": "count: 1}\n    checkpoint: {every_steps: 2, keep: 1}",
    "precision: bf16": "precision: fp32",
    "global_rows: 16": "global_rows: 8",
    "max_length: 4096": "max_length: 96",
    "row_tokens: 8192": "row_tokens: 192",
    "template: {kind: model}": "template: {kind: model}\n      num_workers: 0",
}
"""What a tiny model and a CPU need otherwise in the recipe."""


def commands() -> list[str]:
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(block).splitlines()


def own_data(folder: Path) -> None:
    """Conversations, each four times: with an image of several sizes, with two, and with none."""
    (folder / "images").mkdir(parents=True)
    entries = []
    for number, size in enumerate(((64, 64), (200, 40), (30, 90), (64, 48), (8, 8))):
        image("circle", size).save(folder / "images" / f"{number}.png")
        names = [f"{number}.png", "0.png"] if number == 1 else [f"{number}.png"]
        tags = "<image>\n" * len(names)
        turns = [{"from": "human", "value": f"{tags}What is it?"}, {"from": "gpt", "value": "A red circle."}]
        entries.append({"id": str(number), "image": names if len(names) > 1 else names[0], "conversations": turns})
    turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two."}]
    entries.append({"id": "text", "conversations": turns})
    copies = [{**entry, "id": f"{entry['id']}_{copy}"} for copy in range(4) for entry in entries]
    (folder / "mine.json").write_text(json.dumps(copies))


@pytest.mark.slow
def test_the_page_leads_from_images_to_answers(tmp_path: Path) -> None:
    make_published(tmp_path / "published", "qwen3_vl", tied=True)
    own_data(tmp_path / "data")
    (tmp_path / "recipes").mkdir()
    text = (REPOSITORY / RECIPE).read_text(encoding="utf-8")
    for known, tiny in TINY.items():
        assert known in text, known
        text = text.replace(known, tiny)
    (tmp_path / RECIPE).write_text(text, encoding="utf-8")
    (tmp_path / "ds_configs").symlink_to(REPOSITORY / "ds_configs")
    *run, demo = commands()
    assert demo.startswith("sightline demo")
    for command in run:
        words = command.replace("deepspeed trainer/main.py", "python -m trainer.main").split()
        assert words[0] == "python"
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=GUARD_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    model = sightline.load(tmp_path / demo.split()[-1], device="cpu")
    assert isinstance(model.chat(tmp_path / "data/images/1.png", "What is it?", max_new_tokens=3), str)
