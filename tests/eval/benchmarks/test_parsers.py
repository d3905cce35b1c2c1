"""Parsers of yes and no, of texts and of verdicts: official quirks included."""

from __future__ import annotations

import pytest

from eval.benchmarks.parsers import PARSERS, make_parser
from eval.benchmarks.row import Parsed
from tests.eval.benchmarks.rows import row


@pytest.mark.parametrize(
    ("name", "answer", "value", "how"),
    [
        ("yes_no.official", "Yes", "yes", "exact"),
        ("yes_no.official", "No.", "no", "exact"),
        ("yes_no.official", "There is not, I think. Yes", "no", "extracted"),
        ("yes_no.official", "NO", "yes", "none"),
        ("yes_no.official", "", "yes", "none"),
        ("yes_no.official", "I can't tell", "yes", "none"),
        ("yes_no.official", "no\n", "yes", "none"),
        ("yes_no.prefix4", "YES", "yes", "exact"),
        ("yes_no.prefix4", "yes, it is", "yes", "extracted"),
        ("yes_no.prefix4", "not at all", "no", "extracted"),
        ("yes_no.prefix4", "now and then", "no", "extracted"),
        ("yes_no.prefix4", "I see no cat", None, "none"),
        ("yes_no.words", "Yes, it is.", "yes", "extracted"),
        ("yes_no.words", "yes and no", None, "none"),
        ("yes_no.words", "maybe", None, "none"),
        ("yes_no.words", "yes/no", None, "none"),
        ("yes_no.words", "No,there is not", "no", "extracted"),
        ("yes_no.words", "**Yes**", None, "none"),
        ("text.gqa", "Woman.", "woman", "exact"),
        ("text", "  ", None, "none"),
        ("score", "0.5", 0.5, "exact"),
        ("score", "good", None, "none"),
    ],
)
def test_what_an_answer_says_and_how_that_was_found(name: str, answer: str, value: object, how: str) -> None:
    assert make_parser(name)(answer, row()) == Parsed(value, how)  # type: ignore[arg-type]


def test_real_world_questions_are_letters_where_the_truth_is_one() -> None:
    parse = make_parser("real_world_qa")
    assert parse("B. The left one", row("B")).value == "B"
    assert parse("Three.", row("three")).value == "three"


@pytest.mark.parametrize("name", PARSERS)
def test_no_parser_falls_over_an_odd_answer(name: str) -> None:
    asked = row("1", "ABCD", question_type="free_form", answer_type="integer", width=10, height=20)
    for answer in ("", " ", "\n", "....", "\u2028", "[1, 2, 3]", "A" * 5000, "(", "1e999", "٣"):
        make_parser(name)(answer, asked)
