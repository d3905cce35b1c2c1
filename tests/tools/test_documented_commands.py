"""Every command that README and docs print runs: here on a small set, or in the test that the table names."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from models.common.errors import run_cli
from tests.support import warm
from tests.support.backbones import tiny_recipe, write_recipe
from tests.support.benchmarks import make_benchmark
from tests.support.documents import PAGES, commands, commands_of
from tests.support.paths import REPOSITORY
from tests.support.shards import caption_sample, tiny_tokenizer, write_set, write_tar
from tests.tools.conftest import beside

EVALUATED = commands_of("docs/evaluation.md", "python -m eval.run runs/x/bundle")
SHARDS = commands_of("docs/data.md", "python -m tools.shards")
OWN_DATA = commands_of("docs/recipes.md", "python -m tools.shards")
BUNDLED = commands_of("docs/bundle.md", *(f"python -m tools.{name} " for name in ("merge", "quantize", "bundle")))
SYNTHETIC = [
    *commands_of("docs/cluster.md", "python -m tools.toy", "python -m tools.shards make"),
    *commands_of("docs/recipes.md", "sightline toy"),
]
OWN_RECIPE = [
    *commands_of("docs/recipes.md", "sightline preflight recipes/mine.yaml", "python -m trainer.main"),
    *commands_of("docs/training.md", "sightline audit", "sightline ledger", "sightline replay"),
]
HERE = {*EVALUATED, *SHARDS, *OWN_DATA, *BUNDLED, *SYNTHETIC, *OWN_RECIPE}

ELSEWHERE = {
    r"make (bench-\*|--resize)$": "",  # a family of commands, and a word of a sentence
    r"make ": "tests/tools/test_cli.py",  # what a target runs answers there
    r"sbatch ": "tests/slurm/test_training.py",
    r"deepspeed trainer/main.py": "tests/tools/examples/test_quickstart.py",
    r"sightline convert": "tests/tools/convert/test_image_size.py",  # with files that it makes itself
    r"sightline export": "tests/tools/export/test_export_stock.py",  # and its neighbours, one for each format
    r"python -m tools.toy import-llama2c": "tests/tools/examples/synthetic/test_llama2c.py",
    r"python -m deepspeed.utils.zero_to_fp32": "tests/tools/export/test_merge_deepspeed.py",  # the peer's
    r"python -m tools.bench": "tests/tools/dev/bench/test_step.py",
    r"python -m tools.preflight recipes/qwen": "tests/tools/examples/test_native_page.py",
    r"python -m tools.preflight.sizing": "tests/tools/preflight/test_sizing.py",
    r"(python -m tools|sightline).report": "tests/tools/examples/test_report.py",
    r"python -m eval.run clip": "tests/eval/test_retrieval_task.py",
    r"python -m eval.score": "tests/eval/test_score.py",
    r"sightline (judge|score mmvet)": "tests/eval/test_judge.py",
    r"python -m lmms_eval": "tests/eval/test_lmms.py",  # the peer's
    r"python -m vllm": "tests/tools/dev/bench/test_serve.py",  # the peer's
    r"sightline compare": "tests/tools/inspect/test_compare.py",
    r"sightline contamination": "tests/tools/inspect/test_contamination.py",
    r"sightline --help": "tests/tools/test_cli.py",
    r"python -m trainer.main$": "tests/trainer/test_main.py",
    r"python -m tools.shards index": "tests/tools/shards/test_shards.py",
    r"sightline eval$": "tests/eval/test_run.py",
    r"sightline ledger$": "tests/tools/inspect/test_ledger.py",
    r"sightline audit$": "tests/tools/inspect/test_audit.py",
    r"sightline versions": "tests/tools/inspect/test_versions.py",
    r"sightline preflight (RECIPE )?--numerics": "tests/tools/preflight/test_numerics.py",
    r"python -m eval.speculate": "tests/eval/test_speculative.py",
    r"sightline preflight( recipes/(X|NAME).yaml.*)?$": "tests/tools/preflight/test_preflight.py",
    r"sightline demo": "tests/tools/serve/test_page.py",
    r"sightline serve": "tests/tools/serve/test_serving_page.py",
    r"python -m (tools.(shards|merge|quantize)|eval.run)": "tests/tools/examples/test_quickstart.py",  # README's
}


def run(line: str, *more: object) -> int:
    """A printed command with arguments behind it that make it small, by the `main` that it would run."""
    from tools.cli import VERBS, dispatch

    words = [*shlex.split(line), *map(str, more)]
    if words[0] == "sightline":
        return run_cli(dispatch, words[1:])
    assert words[:2] == ["python", "-m"]
    verb = words[2].rpartition(".")[2]
    if words[2] in ("eval.run", "trainer.main"):
        verb = {"eval.run": "eval", "trainer.main": "train"}[words[2]]
    assert verb in VERBS
    return run_cli(dispatch, [verb, *words[3:]])


def photos(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (50 * number, 90, 120)).save(folder / name)


def write(path: str, value: Any) -> None:
    Path(path).write_text(json.dumps(value))


def chat(image: str) -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A wall."}]
    return [{"id": "1", "image": image, "conversations": turns}]


def test_every_command_is_run_by_a_test() -> None:
    for page in PAGES:
        for line in commands(page):
            tests = [file for pattern, file in ELSEWHERE.items() if re.match(pattern, line)]
            assert line in HERE or tests, f"{page.name}: no test runs {line!r}"
            assert line in HERE or not tests[0] or (REPOSITORY / tests[0]).is_file()
    assert len(HERE) > 20


def test_shards_are_made_as_the_data_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.shards.sources import SOURCES

    monkeypatch.chdir(tmp_path)
    for folder in ("train2017", "photos", "train_images", "holiday"):
        photos(tmp_path / folder, "a.jpg")
    photos(tmp_path / "train2014", "COCO_train2014_000000000009.jpg")
    (tmp_path / "holiday" / "a.txt").write_text("A beach.")
    write("instruct.json", chat("a.jpg"))
    Path("captions.csv").write_text("file_name,caption\na.jpg,A wall.\n")
    annotation = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "A wall."}]}
    write("captions_train2017.json", annotation)
    write("questions.json", {"questions": [{"image_id": 9, "question": "What?", "question_id": 1}]})
    write("annotations.json", {"annotations": [{"question_id": 1, "answers": ["a wall"]}]})
    write("TextVQA_0.5.1_train.json", {"data": [{"image_id": "a", "question": "What?", "answers": ["a wall"]}]})
    Path("data/from_img2dataset").mkdir(parents=True)
    write_tar(tmp_path / "data" / "from_img2dataset" / "0.tar", [("a", caption_sample(1))])
    tiny_tokenizer().save_pretrained("DIR")
    assert len(SHARDS) == 12
    for line in SHARDS:
        if " fetch " in line:
            assert shlex.split(line)[4] in SOURCES  # it would download; tests/tools/shards/test_fetch.py does
        else:
            assert run(line, *([] if " show " in line else ["--jobs", 1, "--quiet"])) == 0, line


def test_own_data_is_made_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", "a.jpg")
    write("mine.json", chat("a.jpg"))
    assert [run(line) for line in OWN_DATA] == [0, 0]
    assert "A wall." in Path("data/mine.html").read_text()


@pytest.mark.slow
def test_a_bundle_is_made_as_its_page_says(
    trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained["run"], "runs/quickstart")
    for line in BUNDLED:
        shutil.rmtree(shlex.split(line)[4], ignore_errors=True)  # the last one makes in one go what two have made
        forced = ["--force"] if "nf4" in line else []  # weights that are random lose more to 4 bits than trained ones
        assert run(line, *forced) == 0, line
        assert (Path(shlex.split(line)[4]) / "sightline.json").is_file()


@pytest.mark.slow
def test_a_bundle_is_measured_as_the_evaluation_page_says(
    trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/bundle").symlink_to(beside(trained, "bundle").resolve())
    tiny = make_benchmark(tmp_path)
    tiny.images.rename("photos")
    for name, made in (("Q", tiny.questions), ("A", tiny.annotations), ("C", tiny.captions)):
        for spelt in (name, name.lower()):
            shutil.copy(made, f"{spelt}.json")
    shutil.copytree("photos", "val2014")
    asked = {"question_id": 1, "image": "scene_000000000000.png", "text": "Is it red?", "label": "yes"}
    for kind in ("random", "popular", "adversarial"):
        write(f"coco_pope_{kind}.json", asked)  # a question a line, and one is enough
    page = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
    block = page.split("# suite.yaml:")[1].split("\n\n")[0].splitlines()[1:]
    Path("suite.yaml").write_text("\n".join(line.strip() for line in block))
    monkeypatch.setenv("PATH", "")  # plain words: Java's METEOR takes ten seconds
    assert len(EVALUATED) == 6
    for line in EVALUATED:
        assert run(line, "--device", "cpu") == 0, line
    suite = json.loads(Path("all.json").read_text())["results"]
    assert [(result["task"], result["shuffled"]) for result in suite][:2] == [("vqa", False), ("vqa", True)]


@pytest.mark.slow
def test_the_synthetic_world_is_drawn_as_the_cluster_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = {
        "world": ["--scenes", 300, "--held-out", 4],
        "clip": ["--steps", 1, "--batch-size", 8],
        "language": ["--steps", 1],
    }
    assert len(SYNTHETIC) == 6
    for line in SYNTHETIC:
        kind = shlex.split(line)[3 if line.startswith("python") else 2]
        assert run(line, *small.get(kind, [])) == 0, line
    assert Path("runs/quickstart/shards/lora/index").is_dir()


@pytest.mark.slow
def test_an_own_recipe_is_checked_tried_audited_and_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "shards", [16])
    recipe = tiny_recipe(tmp_path, tmp_path / "shards")
    for stage in recipe["stages"].values():
        stage["batch"] = {"global_rows": 8, "micro_rows": 1}
    Path("recipes").mkdir()
    write_recipe(tmp_path / "recipes" / "mine.yaml", recipe)
    checked, tried, audited, printed, replayed = OWN_RECIPE
    assert run(checked) == 0
    words = [warm.python(), *shlex.split(tried)[1:]]
    done = subprocess.run(words, cwd=tmp_path, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run(audited.replace("RUN", "runs/try")) == 0
    assert run(printed.replace("RUN", "runs/try")) == 0
    again = [warm.python(), "-m", "tools.replay", *shlex.split(replayed.replace("RUN", "runs/try"))[2:]]
    again[-1] = "12"
    done = subprocess.run(again, cwd=tmp_path, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same rows" in done.stdout


def _environment() -> dict[str, str]:
    """Of a process of its own: what is installed is found from any directory."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}
