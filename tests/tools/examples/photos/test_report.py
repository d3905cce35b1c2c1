"""The page of a run on photos: its figures are those of the evaluations, its photos a draw by seed, its lead honest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import pytest

from eval.evaluation import Opened, evaluate
from eval.run import prepare, suite_configs
from eval.tasks.image_gain import NOT_LOOKED_AT
from tests.support.benchmarks import PROMPT, Seer, make_benchmark
from tools.examples.photos.figures import killed_line, machine
from tools.examples.photos.report import main
from tools.examples.photos.steps import SCORED

KILLED = {"checkpoint": 3, "step": 5}


class Blind(Seer):
    """Says the same and loses the same, whatever it is shown."""

    def answer(self, queries: Sequence[Any], decoding: Any) -> list[str]:
        del decoding
        return ["<b>a red square</b>"] * len(queries)

    def loss(self, queries: Sequence[Any], answers: Sequence[str]) -> list[tuple[float, int]]:
        return [(1.5 * len(answer.split()), len(answer.split())) for _, answer in zip(queries, answers, strict=True)]


def make_run(folder: Path, predictor: Seer) -> Path:
    """What `make photos` leaves before its report, of a model that sees or one that does not."""
    tiny = make_benchmark(folder)
    files = f"captions: {tiny.captions}, images: {tiny.images}, prompt: {PROMPT}"
    caption = f"kind: caption, {files}, meteor: false"
    (folder / "suite.yaml").write_text(
        f"- {{kind: image_gain, data: {{kind: captions, {files}}}}}\n- {{{caption}}}\n"
        f"- {{{caption}, shuffle_pictures: true}}\n"
    )
    for name in SCORED:
        out = folder / "eval" / f"{name}.json"
        out.parent.mkdir(exist_ok=True)
        opened = Opened(lambda: predictor, lambda _: {})
        evaluate(opened, prepare(suite_configs(folder / "suite.yaml")), out, model="model", batch_size=8)
    for name in ("align", "lora"):
        (folder / name).mkdir()
        rows = [{"step": step, "loss": 4.0 / step, "samples_per_s": 2.0} for step in range(1, 9)]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.json").write_text(json.dumps({"seed": 3, "stages": {"lora": {"engine": {"precision": "fp32"}}}}))
    (folder / "lora" / "killed.json").write_text(json.dumps(KILLED))
    (folder / "lora" / "audit.json").write_text(json.dumps({"clean": True}))
    (folder / "seconds.json").write_text(json.dumps({"align": 61.0, "total": 70.0}))
    (folder / "split").mkdir()
    for name, count in (("train", 5), ("held_out", 3)):
        entries = [{"file_name": f"{name}{number}.jpg", "caption": "A."} for number in range(count)]
        (folder / "split" / f"{name}.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # plain words: Java costs half a second a task


@pytest.mark.usefixtures("without_java")
def test_the_figures_are_those_of_the_evaluations(tmp_path: Path) -> None:
    run = make_run(tmp_path, Seer())
    assert main([str(run), "--seed", "3"]) == 0
    report = json.loads((run / "report.json").read_text())
    evaluated = json.loads((run / "eval" / "lora.json").read_text())["results"]
    gain, right, exchanged = (result["metrics"] for result in evaluated)
    found = report["models"]["lora"]
    assert list(report["models"]) == list(SCORED)
    assert found["image_gain"]["value"] == gain["image_gain"] > 0
    assert found["image_gain"]["low"] == evaluated[0]["intervals"]["image_gain"]["low"]
    assert (found["cider"]["value"], found["cider_shuffled"]["value"]) == (right["CIDEr"], exchanged["CIDEr"])
    assert report["killed"] == KILLED
    assert set(report["versions"]) > {"torch", "gguf", "onnx"}
    text, page = (run / "report.txt").read_text(), (run / "report.html").read_text()
    for words in (f"{gain['image_gain']:.3f} [", f"{right['CIDEr']:.3f}", "5 photos trained on, 3 held out by seed 3"):
        assert words in text
    assert "LoRA was killed after step 5 and went on from step 3: no sample lost, none twice" in text
    assert "LoRA was killed after step 5" in page
    assert f"<b class=seen>{gain['image_gain']:.2f} nats a token</b>" in page
    num_photos = len({sample["picture"] for sample in map(json.loads, (run / "eval/lora.caption.jsonl").open())})
    assert page.count("<article") == min(num_photos, 12)
    assert page.count("data:image/") == page.count("<article")
    assert page.count("<svg") == 2
    assert NOT_LOOKED_AT not in text
    assert escape(NOT_LOOKED_AT) not in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.usefixtures("without_java")
def test_a_model_that_does_not_look_is_called_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, Blind())
    assert main([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert escape(NOT_LOOKED_AT) in page
    assert NOT_LOOKED_AT in (run / "report.txt").read_text()
    assert "<b>a red square" not in page
    assert "1 different captions" in page


def test_what_did_not_happen_is_not_claimed() -> None:
    assert "was not killed" in killed_line({"killed": None, "audit": {"clean": True}})
    assert "NOT clean" in killed_line({"killed": KILLED, "audit": {"clean": False}})


def test_the_machine_is_named(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name : Some CPU @ 2 GHz\n")
    assert machine(tmp_path / "cpuinfo").endswith("cores, Some CPU @ 2 GHz")
    assert " cores, " in machine(tmp_path / "none")
