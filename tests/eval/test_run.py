"""The command: one task or a suite on a real tiny bundle, and its one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.run import main
from models.common.errors import run_cli
from tests.support.benchmarks import PROMPT, TinyBenchmark, write
from tests.support.bundles import make_bundle


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"), dtype=request.param)


def vqa_arguments(tiny: TinyBenchmark, model: Path, *options: str) -> list[str]:
    files = ["--questions", str(tiny.questions), "--annotations", str(tiny.annotations), "--images", str(tiny.images)]
    return [str(model), "--task", "vqa", *files, "--device", "cpu", "--out", str(tiny.folder / "out.json"), *options]


def test_suite_measures_all_in_one_process(
    tiny: TinyBenchmark, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vqa = {"kind": "vqa", "questions": tiny.questions, "annotations": tiny.annotations, "images": tiny.images}
    caption = {"kind": "caption", "captions": tiny.captions, "images": tiny.images, "prompt": PROMPT, "meteor": False}
    data = {"kind": "captions", "captions": tiny.captions, "images": tiny.images, "prompt": PROMPT}
    tasks = [vqa, {**vqa, "shuffle_pictures": True}, caption, {"kind": "image_gain", "data": data}]
    suite = tiny.folder / "suite.yaml"
    suite.write_text(json.dumps(tasks, default=str))
    out = tiny.folder / "new" / "out.json"
    assert main([str(bundle), "--suite", str(suite), "--device", "cpu", "--out", str(out)]) == 0

    evaluation = json.loads(out.read_text())
    names = ["vqa", "vqa_shuffled", "caption", "image_gain"]
    assert evaluation["model"] == str(bundle)
    assert [result["name"] for result in evaluation["results"]] == names
    assert [result["shuffled"] for result in evaluation["results"]] == [False, True, False, False]
    for result in evaluation["results"]:
        lines = (out.parent / result["samples"]).read_text().splitlines()
        assert len(lines) == result["num_samples"]
        assert len(result["protocol"]) == 16
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(
        ["out.json", "out.facts.json", *(f"out.{name}.jsonl" for name in names)]
    )
    printed = capsys.readouterr().out
    assert "vqa_shuffled" in printed
    assert "it was not asked for" in printed


def test_one_task_twice_gives_the_same_figures(tiny: TinyBenchmark, bundle: Path) -> None:
    def measure(batch_size: str) -> object:
        assert main(vqa_arguments(tiny, bundle, "--batch-size", batch_size, "--normalisation", "evalai")) == 0
        (tiny.folder / "out.json").rename(tiny.folder / f"{batch_size}.json")
        return json.loads((tiny.folder / f"{batch_size}.json").read_text())

    assert measure("1") == measure("3")


def fails(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(main, arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--questions", "nothing.json"], "nothing.json: no such file"),
        (["--images", "nowhere"], "nowhere: no such folder of images"),
        (["--captions", "c.json"], "--task vqa: captions: this task has no such option"),
        (["--limit", "0"], "limit: Input should be greater than 0"),
        (["--batch-size", "0"], "--batch-size 0: at least 1 is needed"),
        (["--out", "results.txt"], "--out results.txt: a file that ends in .json is needed"),
    ],
)
def test_bad_options(
    tiny: TinyBenchmark, bundle: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(vqa_arguments(tiny, bundle, *options), message, capsys)
    assert not (tiny.folder / "out.json").exists()


def test_no_model_and_no_task(tiny: TinyBenchmark, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(vqa_arguments(tiny, tiny.folder / "nothing"), "nothing: no such folder; give a bundle", capsys)
    fails([str(bundle), "--out", "out.json"], "give --task with its files, or --suite", capsys)
    empty = tiny.folder / "empty"
    empty.mkdir()
    fails(vqa_arguments(tiny, empty), "is no bundle", capsys)


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ([], "a suite is a YAML list of tasks"),
        ([{"kind": "vqa"}], "task 1: images: is needed; questions: is needed"),
        ([{"kind": "ocr"}], "task 1: task: Input tag 'ocr'"),
        ([3], "task 1: task:"),
    ],
)
def test_bad_suites(
    tiny: TinyBenchmark, bundle: Path, suite: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tiny.folder / "suite.yaml", suite)
    fails([str(bundle), "--suite", str(path), "--out", str(tiny.folder / "out.json")], message, capsys)


def test_two_tasks_of_one_name(tiny: TinyBenchmark, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vqa = {"kind": "vqa", "questions": tiny.questions, "annotations": tiny.annotations, "images": tiny.images}
    path = tiny.folder / "suite.yaml"
    path.write_text(json.dumps([vqa, vqa], default=str))
    message = "two tasks of the suite are called 'vqa': give one a `name`"
    fails([str(bundle), "--suite", str(path), "--out", str(tiny.folder / "out.json")], message, capsys)
