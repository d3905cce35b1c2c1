"""A judge's requests and replies: from answers to figures, without asking one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.judge import main
from eval.results import write_results, write_samples
from eval.score import Sources, score
from eval.tasks import make_task
from eval.tasks.config import BenchmarkConfig
from models.common.errors import InputError
from tests.support.benchmarks import Seer, TinyBenchmark


def evaluation(tiny: TinyBenchmark, name: str, entries: Any) -> Path:
    file, out = tiny.folder / "questions.json", tiny.folder / "out.json"
    file.write_text(json.dumps(entries))
    task = make_task(BenchmarkConfig(benchmark=name, questions=(str(file),), images=tiny.images))
    result = task.run(Seer(), 2)
    path = write_samples(out, name, result.samples)
    write_results(out, {"model": "seer", "results": [{**result.as_dict(), "samples": path.name}]})
    return out


def lines(path: Path, entries: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def mmvet(tiny: TinyBenchmark) -> Path:
    entry = {"imagename": "scene_000000000000.png", "question": "Which {answer}?", "capability": ["rec"]}
    return evaluation(tiny, "mmvet", {f"v1_{place}": {**entry, "answer": "red<OR>crimson"} for place in range(2)})


def test_mmvet_from_answers_over_two_runs_of_a_judge_to_figures(tiny: TinyBenchmark) -> None:
    requests, verdicts = tiny.folder / "requests.jsonl", tiny.folder / "verdicts.jsonl"
    assert main(["export", str(mmvet(tiny)), "--out", str(requests)]) == 0
    first, second = [json.loads(line) for line in requests.read_text().splitlines()]
    assert first["prompt"].endswith("Question: Which {answer}?\nReference: red<OR>crimson\nAnswer: red\n")
    runs = [
        lines(tiny.folder / f"run_{run}.jsonl", [{"id": each["id"], "reply": text} for each in (first, second)])
        for run, text in enumerate(("0.4", "Score: 1.0"))
    ]
    assert main(["import", str(requests), "--replies", *runs, "--out", str(verdicts)]) == 0
    found = score("mmvet", Sources((str(verdicts),)), judge="one of ours")
    assert found.metrics == {"total": pytest.approx(70.0)}
    assert found.details["groups"] == {
        "total/1": pytest.approx(40.0),
        "total/2": pytest.approx(100.0),
        "total/rec": pytest.approx(70.0),
    }


def test_llava_bench_has_references_of_its_own_and_the_users_template(tiny: TinyBenchmark) -> None:
    entry = {"image": "scene_000000000001.png", "text": "Which?", "category": "conv"}
    out = evaluation(tiny, "llava_bench", [{**entry, "question_id": place} for place in range(2)])
    requests, verdicts, template = (tiny.folder / name for name in ("requests.jsonl", "verdicts.jsonl", "prompt.txt"))
    with pytest.raises(InputError, match="give --references"):
        main(["export", str(out), "--out", str(requests)])
    template.write_text("{question} | {reference} | {answer} | {other}")
    references = lines(tiny.folder / "gpt4.jsonl", [{"question_id": place, "text": "green"} for place in range(2)])
    words = ["--references", references, "--template", str(template), "--out", str(requests)]
    assert main(["export", str(out), *words]) == 0
    assert json.loads(requests.read_text().splitlines()[0])["prompt"] == "Which? | green | lime | {other}"
    replies = lines(tiny.folder / "r.jsonl", [{"id": "0", "reply": "8 6\nwhy"}, {"id": "1", "reply": "10, 3"}])
    assert main(["import", str(requests), "--replies", replies, "--out", str(verdicts)]) == 0
    assert score("llava_bench", Sources((str(verdicts),))).metrics == {"relative": pytest.approx(50.0)}


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([{"id": "v1_0", "reply": "0.5"}], "has no reply about v1_1"),
        ([{"id": "v1_0", "reply": "good"}, {"id": "v1_1", "reply": "0.5"}], "a number from 0 to 1"),
        ([{"id": "v1_0", "reply": "7"}, {"id": "v1_1", "reply": "0.5"}], "a number from 0 to 1"),
        ([{"id": "v1_0", "reply": "1"}, {"id": "v1_0", "reply": "1"}], "an id of its own"),
    ],
)
def test_a_reply_that_is_missing_or_none_is_an_error(
    tiny: TinyBenchmark, replies: list[dict[str, Any]], message: str
) -> None:
    requests = tiny.folder / "requests.jsonl"
    main(["export", str(mmvet(tiny)), "--out", str(requests)])
    file = lines(tiny.folder / "replies.jsonl", replies)
    with pytest.raises(InputError, match=message):
        main(["import", str(requests), "--replies", file, "--out", str(tiny.folder / "v.jsonl")])
