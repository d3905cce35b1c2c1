"""Rules beside what the official code gives."""

from __future__ import annotations

import pytest

from eval.benchmarks.rules import RULES
from eval.vqa import answer_accuracy
from tests.eval.benchmarks.rows import row


@pytest.mark.parametrize(
    ("rule", "value", "truth", "score"),
    [
        ("equal", "Yes ", "yes", 1.0),
        ("equal_exactly", "a", "A", 0.0),
        ("relaxed", "105", "100", 1.0),
        ("relaxed", "105.1", "100", 0.0),
        ("relaxed", "2012", "1990", 1.0),
        ("relaxed", "2%", "2", 0.0),
        ("relaxed", "2%", "0.02", 1.0),
        ("relaxed", "2%%", "0.02", 1.0),
        ("relaxed", "0", "0", 1.0),
        ("relaxed", "0.001", "0", 0.0),
        ("relaxed", "977,633", "977633", 0.0),
        ("relaxed", "Blue", "blue", 1.0),
        ("relaxed", "blue.", "blue", 0.0),
        ("anls", "ITC  Limited", ["itc limited"], 1.0),
        ("anls", "itc limitet", ["itc limited", "itc"], 1 - 1 / 11),
        ("anls", "0.22", ["0.28"], 0.75),
        ("anls", "ab", ["ax"], 0.5),
        ("anls", "abc", ["axx"], 0.0),
        ("anls", "a  b", ["a b"], 1.0),
        ("anls", "a  c", ["a b"], 1 - 1 / 4),
    ],
)
def test_how_right_a_value_is(rule: str, value: str, truth: object, score: float) -> None:
    assert RULES[rule](value, row(truth)) == score


def test_ocr_keeps_case_and_drops_blanks_for_one_set_alone() -> None:
    contains = RULES["contains"]
    assert contains("It says HELLO\nworld", row(["hello world"])) == 1.0
    assert contains("x y", row(["xy"])) == 0.0
    assert contains("x y", row(["xy"], dataset_name="HME100k")) == 1.0
    assert contains("X y", row(["xy"], dataset_name="HME100k")) == 0.0


@pytest.mark.parametrize("normalisation", ["official", "evalai"])
def test_vqa_accuracy_is_the_one_of_the_vqa_task(normalisation: str) -> None:
    people = ["red"] * 3 + ["Red."] * 2 + ["blue"] * 5
    accuracy = RULES[f"vqa.{normalisation}"]("red", row(people))
    assert accuracy == answer_accuracy("red", people, normalisation)  # type: ignore[arg-type]
