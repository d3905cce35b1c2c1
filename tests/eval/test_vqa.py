"""VQA accuracy against published figures and the published code's quirks."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from eval.vqa import (
    Normalisation,
    VqaItem,
    answer_accuracy,
    normalise_evalai,
    normalise_official,
    score,
)
from models.common.errors import InputError
from tests.support.paths import data, needs_data


def items_of(annotations: str) -> dict[str, VqaItem]:
    records = json.loads(gzip.decompress(data("eval", annotations).read_bytes()))["annotations"]
    return {
        str(record["question_id"]): VqaItem(
            tuple(answer["answer"] for answer in record["answers"]),
            record.get("answer_type"),
            record.get("question_type"),
        )
        for record in records
    }


def answers_of(predictions: str) -> dict[str, str]:
    records = json.loads(data("eval", "predictions", predictions).read_text())
    return {str(record["question_id"]): record["answer"] for record in records}


@needs_data
@pytest.mark.parametrize(
    ("predictions", "annotations", "official", "evalai"),
    [
        ("vqav2_subset_valid_first.json", "vqav2_subset/valid_annotations.json.gz", 87.22, 87.2118),
        ("vqav2_subset_valid_majority.json", "vqav2_subset/valid_annotations.json.gz", 96.60, 96.6009),
        ("textvqa_val_first.json", "textvqa/val_annotations_vqa_format.json.gz", 87.15, 87.144),
    ],
)
def test_published_figures(predictions: str, annotations: str, official: float, evalai: float) -> None:
    items, answers = items_of(annotations), answers_of(predictions)
    assert score(items, answers, "official").accuracy == official
    assert round(score(items, answers, "evalai").accuracy, 4) == evalai


@needs_data
@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        ("vqav2_subset_valid_first.json", {"other": 77.79, "yes/no": 97.00, "number": 87.29}),
        ("vqav2_subset_valid_majority.json", {"other": 93.42, "yes/no": 100.00, "number": 96.53}),
    ],
)
def test_published_figures_by_answer_type(predictions: str, expected: dict[str, float]) -> None:
    result = score(items_of("vqav2_subset/valid_annotations.json.gz"), answers_of(predictions), "official")
    assert result.by_answer_type == expected
    assert len(result.by_question_type) > 50


@needs_data
def test_answers_without_an_id_count_once_each() -> None:
    """VizWiz's file has no answer_id; the published code would drop all equal answers as the same annotator's."""
    items = items_of("vizwiz/val_annotations_vqa_format.json.gz")
    unanimous = {key: item for key, item in items.items() if len(set(item.human_answers)) == 1}
    assert unanimous
    answers = {key: item.human_answers[0] for key, item in unanimous.items()}
    assert score(unanimous, answers, "official").accuracy == 100.0


@pytest.mark.parametrize("normalisation", ["official", "evalai"])
@pytest.mark.parametrize(("num_matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_by_matching_people(num_matches: int, accuracy: float, normalisation: Normalisation) -> None:
    people = ["cat"] * num_matches + [f"dog {number}" for number in range(10 - num_matches)]
    assert answer_accuracy("cat", people, normalisation) == pytest.approx(accuracy, abs=1e-12)


def test_official_compares_letters_as_they_are_where_people_agree() -> None:
    assert answer_accuracy("yes", ["Yes"] * 10, "official") == 0.0
    assert answer_accuracy("yes", ["Yes"] * 10, "evalai") == 1.0
    assert answer_accuracy("yes", ["Yes"] * 9 + ["no"], "official") == 1.0


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Two dogs", "2 dogs"),
        ("None", "0"),
        ("dont", "don't"),
        ("3.5", "3.5"),
        ("a.m.", "am"),
        (".5", ".5"),
        ("1,000", "1000"),  # a comma between digits: every mark goes without a space ...
        ("1,000/red-blue", "1000redblue"),
        ("red/blue", "red blue"),  # ... else a mark becomes a space ...
        ("red/ blue", "red blue"),
        ("red/ blue/green", "red bluegreen"),  # ... unless the same mark touches a space anywhere
        ("line\nbreak\ttab ", "line break tab"),
        ("." * 40, "." * 8),  # the published call passes re.UNICODE, 32, as the number of periods to strip
        ("what?", "what"),
    ],
)
def test_official_normalisation(text: str, normalised: str) -> None:
    assert normalise_official(text) == normalised


def test_evalai_splits_the_genitive_and_drops_commas() -> None:
    assert normalise_evalai("the dog's bowl") == "dog 's bowl"
    assert normalise_official("the dog's bowl") == "dog's bowl"
    assert normalise_evalai("red,blue") == "redblue"
    assert normalise_official("red,blue") == "red blue"


@pytest.mark.parametrize(
    ("items", "answers", "message"),
    [
        ({}, {}, "no questions to score"),
        ({"1": VqaItem(("a",) * 10)}, {}, "1 of 1 questions have no answer, the first is 1"),
        ({"7": VqaItem(("a",))}, {"7": "a"}, "question 7: VQA accuracy needs at least 4 human answers"),
    ],
)
def test_refuses(items: Any, answers: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(items, answers, "official")
