"""What is installed works from any directory, and another project's packages of our names are named."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from inspect import cleandoc
from pathlib import Path

import pytest

from sightline_packages import clash
from tests.support.backbones import tiny_recipe, write_recipe
from tests.support.bundles import image
from tests.support.installed import build_wheel, fresh_environment
from tests.support.pages import PAGE_TOKENS, answer_of_page
from tests.support.paths import REPOSITORY
from tests.support.shards import write_set
from trainer.config.recipe import load_recipe
from trainer.config.shipped import find_recipe, shipped


def run(folder: Path, *words: str, path: Path | str = REPOSITORY) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Another project with a package `models`."""
    (tmp_path / "other/models").mkdir(parents=True)
    (tmp_path / "other/models/__init__.py").write_text("")
    return tmp_path / "other"


@pytest.mark.parametrize("module", ["trainer.main", "tools.merge", "tools.cli", "eval.run"])
def test_another_projects_models_is_one_line_with_both_places(foreign: Path, tmp_path: Path, module: str) -> None:
    done = run(tmp_path, sys.executable, "-m", module, "--help", path=f"{foreign}:{REPOSITORY}")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: the package `models` of another project at {foreign}/models hides Sightline's at {REPOSITORY}/models; "
        f"take {foreign} off PYTHONPATH, or start in another directory\n"
    )


def test_the_sightline_command_says_it_of_tools_too(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tools.py").write_text("")
    script = tmp_path / "sightline"
    script.write_text("import sys\nfrom sightline_packages import main\nsys.exit(main())\n")
    done = run(tmp_path, sys.executable, str(script), path=f"{tmp_path / 'other'}:{REPOSITORY}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the package `tools` of another project at {tmp_path}/other/tools.py hides")
    assert done.stderr.count("\n") == 1


def test_an_import_of_ours_says_it_as_an_import_error(foreign: Path, tmp_path: Path) -> None:
    done = run(tmp_path, sys.executable, "-c", "import trainer", path=f"{foreign}:{REPOSITORY}")
    assert "PackageClashError: the package `models` of another project at" in done.stderr


def test_nothing_hides_our_own() -> None:
    assert clash(REPOSITORY) is None


def test_shipped_recipes_are_found_from_any_directory_and_own_ones_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/llava15_tiny.yaml").name == load_recipe("llava15_tiny.yaml").name
    assert find_recipe(Path("elsewhere/llava15_tiny.yaml")) == Path("elsewhere/llava15_tiny.yaml")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/llava15_tiny.yaml").write_text("mine")
    assert find_recipe(Path("recipes/llava15_tiny.yaml")) == Path("recipes/llava15_tiny.yaml")


@pytest.mark.slow
def test_installed_it_has_its_files_and_its_commands_in_any_directory(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    done = run(tmp_path, *pip, "--target", str(target), str(wheel))
    assert done.returncode == 0, done.stderr
    for folder, pattern in (("ds_configs", "*.json"), ("recipes", "*.yaml")):
        ours = {file.name: file.read_bytes() for file in shipped(folder).glob(pattern)}  # type: ignore[arg-type]
        assert ours
        assert {file.name: file.read_bytes() for file in (target / "trainer" / folder).iterdir()} == ours
    ours = {file.name: file.read_bytes() for file in (REPOSITORY / "eval/benchmarks/data").iterdir()}
    assert {file.name: file.read_bytes() for file in (target / "eval/benchmarks/data").iterdir()} == ours
    program = (
        "from trainer.config.recipe import load_recipe; from trainer.config.schema import DS_CONFIGS;"
        "recipe = load_recipe('recipes/llava15_tiny.yaml');"
        "[print((DS_CONFIGS / f'{stage.engine.zero}.json').is_file()) for stage in recipe.stages.values()];"
        "print(DS_CONFIGS)"
    )
    done = run(tmp_path, sys.executable, "-c", program, path=target)
    assert done.stdout.splitlines()[-1] == str(target / "trainer" / "ds_configs"), done.stderr
    assert set(done.stdout.splitlines()[:-1]) == {"True"}
    # -S: an editable installation in this environment would find what `target` lacks.
    command = (sys.executable, "-S", str(target / "bin/sightline"))
    both = f"{target}:{sysconfig.get_path('purelib')}"
    done = run(tmp_path, *command, "--help", path=both)
    assert (done.returncode, "train" in done.stdout, "chaos" in done.stdout) == (0, True, False), done.stderr
    assert not {"dev", "examples", "bench", "toy.py", "chaos.py"} & {file.name for file in (target / "tools").iterdir()}
    done = run(tmp_path, *command, "quickstart", path=both)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "sightline quickstart: is not installed; a checkout of the project has it" in done.stderr


@pytest.mark.slow
def test_a_fresh_environment_trains_merges_quantizes_and_answers_from_another_directory(
    wheel: Path, tmp_path: Path
) -> None:
    """`pip install` of the wheel, then every command as a process in a directory that knows nothing of the checkout."""
    python, home = fresh_environment(tmp_path / "fresh", wheel), tmp_path / "home"
    write_set(home / "shards", [16])
    recipe = tiny_recipe(home, home / "shards")
    for stage in recipe["stages"].values():
        stage["duration"] = {"unit": "steps", "count": 2}
        stage["engine"]["precision"] = "bf16"
    write_recipe(home / "mine.yaml", recipe)
    image().save(home / "photo.png")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"DS_ACCELERATOR": "cpu"}

    def done(*words: str) -> str:
        command = [str(python), *words]
        ended = subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
        return ended.stdout

    assert done("-c", "import trainer; print(trainer.__file__)").startswith(str(tmp_path / "fresh"))
    done("-m", "trainer.main", "mine.yaml", "--stage", "all")
    sightline = str(python.with_name("sightline"))
    done(sightline, "merge", "run", "merged", "--stage", "lora", "--probes", "2")
    done(sightline, "quantize", "merged", "small", "--to", "nf4", "--probes", "2", "--force")
    question = "What is it?"
    program = (
        "import sightline; model = sightline.load('small', device='cpu');"
        f"print(model.chat('photo.png', {question!r}, max_new_tokens={PAGE_TOKENS}))"
    )
    command = [str(python), sightline, "demo", "small", "--device", "cpu"]
    answer = answer_of_page(command, home / "photo.png", question, where=home, variables=variables)
    assert answer == cleandoc(done("-c", program))
