"""A benchmark as a task: what is asked, which pictures are shown, and that a suite may have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.tasks import make_task
from eval.tasks.config import BenchmarkConfig
from models.common.errors import InputError
from tests.eval.benchmarks.test_tables import write_parquet
from tests.support.benchmarks import COLOURS, Seer, TinyBenchmark


def pope(tiny: TinyBenchmark, **options: Any) -> BenchmarkConfig:
    lines = [
        {"question_id": place, "image": f"scene_{place:012d}.png", "text": "Is it red?", "label": label}
        for place, label in enumerate(("yes", "no", "no"))
    ]
    file = tiny.folder / "coco_pope_random.json"
    file.write_text("\n".join(map(json.dumps, lines)))
    return BenchmarkConfig(benchmark="pope", questions=(str(file),), images=tiny.images, **options)


def test_pope_of_one_who_sees_and_with_exchanged_pictures(tiny: TinyBenchmark) -> None:
    seer = Seer()
    right, blind = make_task(pope(tiny)), make_task(pope(tiny, shuffle_pictures=True))
    assert (right.name, blind.name) == ("pope", "pope_shuffled")
    result = right.run(seer, batch_size=2)
    assert result.metrics["f1/mean"] == 1.0
    assert set(result.metrics) == set(right.metric_names)
    assert seer.prompts[0] == "Is it red?\nAnswer the question using a single word or phrase."
    assert result.details["published"]
    shuffled = blind.run(seer, batch_size=2)
    assert shuffled.metrics["accuracy"] == pytest.approx(1 / 3)
    assert all(sample["picture"] != Path(sample["shown"]).name for sample in shuffled.samples)
    assert result.protocol == shuffled.protocol


def test_pictures_inside_of_a_parquet_are_shown(tiny: TinyBenchmark) -> None:
    path = write_parquet(tiny.folder / "test.parquet")
    task = make_task(BenchmarkConfig(benchmark="ai2d", questions=(str(path),)))
    assert task.ask(Seer(), 2, range(3), progress=False) == list(COLOURS)


def test_a_question_without_a_picture_is_asked_without_one(tiny: TinyBenchmark) -> None:
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None, "split": "test"}
    file = tiny.folder / "problems.json"
    file.write_text(json.dumps({"4": problem}))

    class Blind(Seer):
        def answer(self, queries: Any, decoding: Any) -> list[str]:
            assert [query.images for query in queries] == [()]
            return ["B"]

    task = make_task(BenchmarkConfig(benchmark="scienceqa", questions=(str(file),)))
    assert task.run(Blind(), 1).metrics["accuracy"] == 100.0


def test_what_is_missing_is_named_before_a_model_is_needed(tiny: TinyBenchmark) -> None:
    config = pope(tiny)
    with pytest.raises(InputError, match="no benchmark 'popes'"):
        make_task(config.model_copy(update={"benchmark": "popes"}))
    with pytest.raises(InputError, match="give the folder with --images"):
        make_task(config.model_copy(update={"images": None}))
    with pytest.raises(InputError, match="no parser 'box'"):
        make_task(config.model_copy(update={"parse": "box"}))
    next(tiny.images.glob("*1.png")).unlink()
    with pytest.raises(InputError, match="lacks 1 of 3 images"):
        make_task(config)


def test_limits_and_other_parsers_are_no_longer_the_published_protocol(tiny: TinyBenchmark) -> None:
    whole = make_task(pope(tiny)).run(Seer(), 3)
    for options in ({"limit": 2}, {"parse": "yes_no.words"}, {"max_new_tokens": 4}):
        other = make_task(pope(tiny, **options)).run(Seer(), 3)
        assert other.protocol != whole.protocol
        assert "published" not in other.details


def test_a_judged_benchmark_gives_its_answers_and_no_figure(tiny: TinyBenchmark) -> None:
    file = tiny.folder / "mm-vet.json"
    entry = {"imagename": "scene_000000000000.png", "question": "Which?", "answer": "red", "capability": ["rec"]}
    file.write_text(json.dumps({"v1_0": entry}))
    task = make_task(BenchmarkConfig(benchmark="mmvet", questions=(str(file),), images=tiny.images))
    result = task.run(Seer(), 1)
    assert result.metrics == {}
    assert [(sample["answer"], sample["truth"]) for sample in result.samples] == [("red", "red")]
