"""What a job runs is copied whole or not at all, and never a second time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.common.errors import InputError
from tests.support.backbones import tiny_recipe, write_recipe
from tools.inspect import snapshot
from tools.inspect.snapshot import main


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, in a repository of two folders."""
    root = tmp_path / "repository"
    for name, file in (("trainer", "main.py"), ("slurm", "stage1.sh"), ("slurm", "site.env")):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / file).write_text(file)
    (root / "sightline_packages.py").touch()
    monkeypatch.setattr(snapshot, "ROOT", root)
    monkeypatch.setattr(snapshot, "CODE", ("trainer", "slurm"))
    (tmp_path / "vision").mkdir()
    return write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, tmp_path / "shards"))


def test_code_and_recipe_are_copied_once(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = recipe.parent / "run" / "jobs" / "7"
    words = [str(recipe), "seed=3", "--stage", "align", "--job", "7"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{job}\n"
    copied = sorted(str(path.relative_to(job)) for path in job.rglob("*") if path.is_file())
    assert copied == ["job.json", "recipe.yaml", "sightline_packages.py", "slurm/stage1.sh", "trainer/main.py"], (
        "the site's file stays behind"
    )
    facts = json.loads((job / "job.json").read_text())
    assert (facts["stage"], facts["overrides"]) == ("align", ["seed=3"])
    (snapshot.ROOT / "trainer" / "main.py").write_text("changed since")
    assert main(words) == 0
    assert (job / "trainer" / "main.py").read_text() == "main.py"


def test_a_copy_that_was_broken_off_is_made_anew(recipe: Path) -> None:
    left = recipe.parent / "run" / "jobs" / ".7.tmp"
    left.mkdir(parents=True)
    (left / "half").touch()
    assert main([str(recipe), "--stage", "align", "--job", "7"]) == 0
    assert [path.name for path in left.parent.iterdir()] == ["7"]


def test_a_plan_copies_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), "--plan"]) == 0
    assert capsys.readouterr().out == f"{recipe.parent / 'run'}\nalign lora\n"
    assert not (recipe.parent / "run").exists()


def test_what_is_missing_or_wrong_is_said_before_anything_is_copied(recipe: Path) -> None:
    with pytest.raises(InputError, match="--stage and --job are needed, or --plan"):
        main([str(recipe), "--stage", "align"])
    with pytest.raises(InputError, match="pretrain"):
        main([str(recipe), "--stage", "pretrain", "--job", "7"])
    assert not (recipe.parent / "run").exists()
