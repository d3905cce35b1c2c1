"""Every file, module, class and function of ours that README, CONTRIBUTING and docs name is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PACKAGES = ("trainer", "models", "data_pipeline", "eval", "tools", "tests")
FOLDERS = (*PACKAGES, "containers", "docs", "ds_configs", "recipes", "slurm")

MADE_BY_A_PERSON = {
    *("slurm/site.env", "recipes/mine.yaml", "recipes/mine_tiny.yaml"),
    *("models/projectors/residual.py", "tests/models/test_residual_projector.py"),  # CONTRIBUTING's first change
}
PLACEHOLDER = re.compile(r"\b[A-Z]+\b")
"""`recipes/NAME.yaml`, `slurm/logs/NAME-JOB.out`."""


def paths(text: str) -> set[str]:
    """Paths below one of our folders, in backticks or not; relative ones only."""
    found = re.findall(rf"(?<![\w./$-])((?:{'|'.join(FOLDERS)})/[\w./*-]*)", text)
    return {path.rstrip("./") for path in found} | set(re.findall(r"\]\((?!http|#)([^)#]+)", text))


def names(text: str) -> set[str]:
    """Dotted names in backticks that begin with one of our packages."""
    return set(re.findall(rf"`((?:{'|'.join(PACKAGES)})(?:\.\w+)+)`", text))


@cache
def definitions(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def is_defined(body: Sequence[ast.stmt], inner: Sequence[str]) -> bool:
    """Whether `inner` leads from the statements of a module or class to a definition, an assignment or an import."""
    if not inner:
        return True
    for node in body:
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                if node.name == inner[0]:
                    return is_defined(node.body, inner[1:])
            case ast.Assign(targets=targets):
                if len(inner) == 1 and any(isinstance(name, ast.Name) and name.id == inner[0] for name in targets):
                    return True
            case ast.AnnAssign(target=ast.Name(id=name)):
                if len(inner) == 1 and name == inner[0]:
                    return True
    return False


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or something that is defined in one; nothing heavy is imported."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            spec = find_spec(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        if spec is not None and spec.origin is not None:
            return is_defined(definitions(Path(spec.origin)).body, parts[length:])
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    missing = []
    for path in sorted(paths(page.read_text(encoding="utf-8")) - MADE_BY_A_PERSON):
        places = [REPOSITORY, page.parent]
        if not PLACEHOLDER.search(path) and not any(any(place.glob(path)) for place in places):
            missing.append(path)
    assert not missing, f"{page.name} names files that are not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_that_a_page_names_are_there(page: Path) -> None:
    missing = sorted(name for name in names(page.read_text(encoding="utf-8")) if not is_there(name))
    assert not missing, f"{page.name} names modules, classes or functions that are not there"


def test_the_new_names_of_the_changelog_are_there() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    now = [row.rsplit("|", 2)[1] for row in text.splitlines() if row.startswith("| ") and row.endswith(" |")]
    assert now
    assert not sorted(name for name in names("\n".join(now)) if not is_there(name))


def imported_packages(package: str) -> set[str]:
    """The other packages of trainer/ whose modules a package imports, anywhere in its files but for types alone."""
    found = set()
    for file in (REPOSITORY / "trainer" / package).rglob("*.py"):
        tree = definitions(file)
        guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        for_types = {id(inner) for guard in guards for inner in ast.walk(guard)}
        modules = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and id(n) not in for_types]
        found |= {module.split(".")[1] for module in modules if module and module.startswith("trainer.")}
    return found - {package}


def test_the_table_of_packages_is_what_they_import() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.split("### trainer/")[1].split("###")[0]
    said = {
        name: set(re.findall(r"`(\w+)`", last))
        for name, last in re.findall(r"^\| `(\w+)/` \|.*\| (.*) \|$", table, re.M)
    }
    folders = {each.parent.name for each in (REPOSITORY / "trainer").glob("*/__init__.py")} - {"callbacks"}
    assert said.keys() == folders
    assert {name: imported_packages(name) for name in folders} == {
        name: allowed - {"Fragment"} for name, allowed in said.items()
    }


def test_what_is_not_there_would_be_found() -> None:
    assert paths("see trainer/nothing.py, and [that](docs/gone.md#top); not https://x.org/docs/a") == {
        "trainer/nothing.py",
        "docs/gone.md",
    }
    assert names("`trainer.schedule.LearningRate.at` and `trainer.nothing`") == {
        "trainer.schedule.LearningRate.at",
        "trainer.nothing",
    }
    assert is_there("trainer.schedule.LearningRate.at")
    assert is_there("trainer.schedule.LearningRate.schedule")
    assert is_there("trainer.loop.logger")
    assert not is_there("trainer.nothing")
    assert not is_there("trainer.schedule.nothing")
    assert not is_there("trainer.schedule.LearningRate.nothing")


def test_the_recipe_over_a_published_model_is_one(tmp_path: Path) -> None:
    from trainer.config.recipe import load_recipe

    page = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    block = page.partition("## Starting from a published model")[2].partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "mine.yaml").write_text(f"name: x\nrun: {tmp_path}\n{block}", encoding="utf-8")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.model.kind == "published"
    assert recipe.stage("sft").tune.vision.kind == "lora"
