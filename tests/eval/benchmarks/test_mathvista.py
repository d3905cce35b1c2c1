"""MathVista's normalisation: a wrong text becomes some choice, and numbers take the truth's precision."""

from __future__ import annotations

from typing import Any

import pytest

from eval.benchmarks import mathvista
from eval.benchmarks.distance import edit_distance
from tests.eval.benchmarks.rows import row

ANGLES = {"A": "135°", "B": "140°", "C": "145°"}
CHOICE = {"question_type": "multi_choice", "answer_type": "text", "precision": None}


@pytest.mark.parametrize(
    ("answer", "fields", "value"),
    [
        ("C", CHOICE, "145°"),
        ("(b) that one", CHOICE, "140°"),
        ("14", CHOICE, "140°"),
        ("nothing at all", CHOICE, "135°"),
        ('The answer is "145°".', CHOICE, "145°"),
        ("5.0", {"question_type": "free_form", "answer_type": "integer"}, "5"),
        ("five", {"question_type": "free_form", "answer_type": "integer"}, None),
        ("1.249", {"question_type": "free_form", "answer_type": "float", "precision": 1}, "1.2"),
        ("1", {"question_type": "free_form", "answer_type": "float", "precision": 1}, "1.0"),
        ("1.6", {"question_type": "free_form", "answer_type": "float", "precision": None}, "2"),
        ("1.249", {"question_type": "free_form", "answer_type": "float", "precision": 1.0}, "1.2"),
        ("[1, 2]", {"question_type": "free_form", "answer_type": "list"}, "[1, 2]"),
        ("the response: 5", {**CHOICE, "extraction": None}, "135°"),
        ("5", {"question_type": "free_form", "answer_type": "integer", "extraction": None}, None),
        ("5.0", {"question_type": "free_form", "answer_type": "integer", "extraction": 5.0}, "5"),
        ("[5]", {"question_type": "free_form", "answer_type": "integer", "extraction": [5]}, None),
    ],
)
def test_an_answer_takes_the_form_of_the_truth(answer: str, fields: dict[str, Any], value: str | None) -> None:
    assert mathvista.parse(answer, row("x", ANGLES, **fields)).value == value


@pytest.mark.parametrize(
    ("one", "other", "distance"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
)
def test_edit_distance(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance
