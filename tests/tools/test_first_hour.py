"""The cluster guide's first hour: its messages are the code's own, its tests are there, its traffic is computed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support.paths import REPOSITORY
from tools.preflight.geometry import count_parts
from tools.preflight.memory import read_settings, storage
from tools.preflight.report import gigabytes
from tools.preflight.wire import traffic
from trainer.config.recipe import load_recipe

GUIDE = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")
HOUR = GUIDE.partition("## First hour on a real cluster")[2].partition("\n## ")[0]
FAILURES = re.findall(r"^\| `([^`]+)` \|", HOUR, re.MULTILINE)
TORCHS_OWN = "does not have a deterministic implementation"


def literals() -> str:
    """The text of the packages, with strings that are cut over lines joined."""
    files = [file for package in ("trainer", "tools", "models") for file in (REPOSITORY / package).rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text(encoding="utf-8") for file in files))


def test_each_message_is_the_codes_own() -> None:
    text = literals()
    assert len(FAILURES) > 6
    for message in FAILURES:
        if TORCHS_OWN not in message:
            for piece in message.split("…"):
                assert piece.strip() in text, f"docs/cluster.md: {message}: the code says {piece!r} nowhere"


@pytest.mark.slow
def test_the_tests_for_devices_are_collected_and_skipped_here() -> None:
    """Those of one device and of several, by the command that the page names."""
    for more, least in ([], 20), (["--multi"], 3):
        command = [sys.executable, "-m", "tools.dev.gpu_tests", "--collect", *more]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        found = re.findall(r"^tests/\S+::", done.stdout, re.MULTILINE)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(found) >= least


@pytest.mark.parametrize("line", re.findall(r"^\| (?:projector|LoRA|in full).*s \|$", GUIDE, re.MULTILINE))
def test_the_traffic_of_7b_is_computed(line: str) -> None:
    title, gpus, gathered, reduced, seconds = (cell.strip() for cell in line.strip("|").split("|"))
    name, zero = ("align" if title.startswith("projector") else "lora"), title[-5:]
    full = ["stages.lora.tune.language={kind: full, learning_rate: 2e-5}"] if title.startswith("in full") else []
    num_gpus = int(gpus)
    recipe = load_recipe(REPOSITORY / "recipes" / "llava15_vicuna7b.yaml", [*full, f"stages.{name}.engine.zero={zero}"])
    stage = recipe.stage(name)
    counts = count_parts(recipe.model, stage.tune)
    trained = sum(part.trained for part in counts.values())
    step = traffic(counts, stage, storage(stage, read_settings(zero), trained, num_gpus), load="full")
    assert (gathered, reduced) == (gigabytes(step.gathered), gigabytes(step.reduced))
    assert seconds == f"{step.seconds:.3f} s"
