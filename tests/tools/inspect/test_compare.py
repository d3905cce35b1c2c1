"""Two evaluations beside each other: what is refused, what the table and the page show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.evaluation import Opened, evaluate
from eval.score import main as score
from eval.tasks import make_task
from eval.tasks.config import CaptionConfig, ImageGainConfig, QuestionData, TaskConfig, VqaConfig
from models.common.errors import InputError
from tests.support.benchmarks import PROMPT, Seer, TinyBenchmark, make_benchmark
from tools.inspect.compare import compare_files, main


def pope(folder: Path, name: str, answers: list[str]) -> Path:
    rows: list[dict[str, Any]] = [
        {"question_id": place, "category": "random", "image": f"{place // 2}.jpg", "label": "yes", "prediction": answer}
        for place, answer in enumerate(answers)
    ]
    path = folder / f"{name}.answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / f"{name}.json"
    score(["pope", "--predictions", str(path), "--out", str(out)])
    return out


class Blind(Seer):
    """Says red to everything."""

    def answer(self, queries: Any, decoding: Any) -> list[str]:
        return ["red"] * len(super().answer(queries, decoding))


@pytest.fixture
def suites(tmp_path: Path) -> tuple[TinyBenchmark, Path, Path]:
    tiny = make_benchmark(tmp_path)
    (tmp_path / "model").mkdir()
    data = QuestionData(questions=tiny.questions, annotations=tiny.annotations, images=tiny.images)
    configs: list[TaskConfig] = [
        VqaConfig(questions=tiny.questions, annotations=tiny.annotations, images=tiny.images),
        CaptionConfig(captions=tiny.captions, images=tiny.images, prompt=PROMPT, meteor=False),
        ImageGainConfig(data=data),
    ]
    outs = [tmp_path / "seer.json", tmp_path / "blind.json"]
    for out, seer in zip(outs, (Seer(), Blind()), strict=True):
        tasks = [make_task(config) for config in configs]
        evaluate(Opened(lambda seer=seer: seer, lambda _: {}), tasks, out, model=str(tmp_path / "model"), batch_size=4)
        (tmp_path / "model" / "weights").write_text("another model")
    return tiny, outs[0], outs[1]


def test_a_suite_is_compared_task_by_task(
    suites: tuple[TinyBenchmark, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, seer, blind = suites
    vqa, caption = compare_files([seer, blind])
    assert (vqa.comparison.metric, vqa.comparison.before, vqa.comparison.after) == ("vqa_accuracy", 100.0, 25.0)
    assert (vqa.comparison.num_better, vqa.comparison.num_worse) == (0, 3)
    assert caption.comparison.metric == "CIDEr"
    assert caption.comparison.after < caption.comparison.before
    page, out = tmp_path / "page.html", tmp_path / "differences.json"
    assert main([str(seer), str(blind), "--page", str(page), "--out", str(out)]) == 0
    text = page.read_text()
    assert "3 of 4 samples differ, 3 are shown" in text
    assert text.count("data:image/jpeg") == 6
    assert "lime" in text
    assert [each["task"] for each in json.loads(out.read_text())] == ["vqa", "caption"]
    assert "McNemar" not in capsys.readouterr().out


def test_the_headline_of_a_benchmark_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = pope(tmp_path, "one", ["No", "Yes"] * 10), pope(tmp_path, "other", ["Yes"] * 20)
    (pair,) = compare_files([one, other])
    assert (pair.comparison.metric, pair.comparison.before) == ("f1/mean", pytest.approx(2 / 3))
    assert pair.comparison.after == 1.0
    assert pair.comparison.num_clusters == 10
    assert pair.comparison.p_value == pytest.approx(2 / 2**10)
    third = pope(tmp_path, "third", ["No"] * 20)
    several = compare_files([one, other, third])
    assert [each.adjusted for each in several] == pytest.approx([4 / 2**10, 4 / 2**10])
    main([str(one), str(other)])
    assert "how these answers were asked is not known" in capsys.readouterr().out


def test_other_protocols_are_refused_with_the_fact_that_differs(tmp_path: Path) -> None:
    one, other = pope(tmp_path, "one", ["Yes"] * 4), pope(tmp_path, "other", ["Yes"] * 6)
    with pytest.raises(InputError, match="measured otherwise: num_samples is 4 and 6"):
        compare_files([one, other])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"other\.json: no such file"),
        ("text", r"other\.json: not valid JSON"),
        ("other", r"other\.json is no evaluation"),
        ("none", r"no task .* is in both: .*one\.json has pope; .*other\.json has none"),
        ("samples", "lacks 1 samples of pope"),
        ("no samples", r"other\.pope\.jsonl: no such file"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path: Path, damage: str, message: str) -> None:
    one, other = pope(tmp_path, "one", ["Yes"] * 4), pope(tmp_path, "other", ["No"] * 4)
    if damage == "missing":
        other.unlink()
    elif damage == "text":
        other.write_text("nothing")
    elif damage == "other":
        other.write_text("[]")
    elif damage == "none":
        other.write_text('{"results": []}')
    elif damage == "no samples":
        (tmp_path / "other.pope.jsonl").unlink()
    else:
        samples = tmp_path / "other.pope.jsonl"
        samples.write_text("".join(samples.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match=message):
        compare_files([one, other])
    with pytest.raises(InputError, match="two evaluations"):
        compare_files([one])
