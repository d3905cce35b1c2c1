"""A benchmark's result: chance, unread answers, groups, and a protocol that says what moved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.rows import rows_of
from eval.benchmarks.scoring import score_answers
from eval.benchmarks.spec import load
from eval.result import TaskResult


def result(name: str, entries: list[dict[str, Any]], answers: list[str], **options: Any) -> TaskResult:
    benchmark = load(name)
    return score_answers(name, benchmark, rows_of(benchmark, entries, "test", {}), answers, asked=None, **options)


def test_guessing_and_what_could_not_be_read_stand_beside_the_figure() -> None:
    entries = [
        {"index": index, "question": "?", "A": "x", "B": "y", "answer": "A"} for index in (7, 1000007, 8, 1000008)
    ]
    found = result("mmbench_dev", entries, ["A", "A", "A", "who knows"])
    assert found.metrics == {"circular": 50.0, "vanilla": 100.0}
    assert found.details["chance"] == {"circular": 25.0, "vanilla": 50.0}
    assert found.details["unparsed"] == 0.25
    assert "25.0% of the answers could not be read" in found.details["note"]


def test_hallusionbench_counts_questions_figures_and_pairs() -> None:
    base = {"category": "VS", "subcategory": "c", "set_id": "0", "question": "?", "filename": None}
    entries = [
        {**base, "figure_id": figure, "question_id": question, "gt_answer": truth}
        for figure, question, truth in (("0", "0", "1"), ("1", "0", "1"), ("1", "1", "0"), ("2", "0", "0"))
    ]
    found = result("hallusionbench", entries, ["no", "yes", "no", "I see."])
    assert found.metrics["accuracy"] == 50.0
    assert found.metrics["figure_accuracy"] == 50.0
    assert found.metrics["question_accuracy"] == 50.0
    assert found.details["num_clusters"] == 1


def test_ocrbench_is_a_count() -> None:
    entries = [{"id": place, "image_path": "a", "question": "?", "answers": ["x"], "type": "t"} for place in range(3)]
    found = result("ocrbench", entries, ["x", "it says X", "y"])
    assert found.metrics["score"] == 2.0
    assert found.details["groups"] == {"score/t": 2.0}


def test_a_protocol_holds_parser_files_and_rows() -> None:
    entries = [{"id": place, "image_path": "a", "question": "?", "answers": ["x"], "type": "t"} for place in range(3)]
    one = result("ocrbench", entries, ["x"] * 3)
    assert one.protocol == result("ocrbench", entries, ["y"] * 3, seed=4).protocol
    assert one.protocol != result("ocrbench", entries[:2], ["x"] * 2).protocol
    assert one.facts["parse"] == {"": "text.raw"}


def test_samples_hold_what_scoring_again_needs(tmp_path: Path) -> None:
    entries = [{"id": 1, "image_path": "a", "question": "?", "answers": ["x"], "type": "t"}]
    (sample,) = result("ocrbench", entries, ["x"]).samples
    assert sample["row"] == entries[0]
    assert sample["score"] == 1.0
    json.dumps(sample)


def test_published_figures_stand_beside_only_where_all_was_asked_alike() -> None:
    entries = [{"id": 1, "image_path": "a", "question": "?", "answers": ["x"], "type": "t"}]
    assert "published" not in result("ocrbench", entries, ["x"]).details
    beside = result("ocrbench", entries, ["x"], is_published=True).details["published"]
    assert beside[0]["value"] == pytest.approx(297)
