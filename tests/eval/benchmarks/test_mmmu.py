"""MMMU's parsers; the values are those that the official eval_utils.py gives."""

from __future__ import annotations

import random

import pytest

from eval.benchmarks import mmmu
from tests.eval.benchmarks.rows import row

PRICES = {"A": "$6", "B": "$7", "C": "$8"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(C).", "C"),
        ("A or B is right", "B"),
        ("Not (A) but (B), or (A)", "A"),
        ("A price that nobody pays", "A"),
        ("The cost is $7 for each of them", "B"),
        ("$7 is it", None),
        ("First $8 and then later on $6", "A"),
        ("B: because", None),
    ],
)
def test_the_letter_of_an_answer_is_the_last_one_named(answer: str, letter: str | None) -> None:
    assert mmmu.option(answer, row("A", PRICES)).value == letter


def test_what_cannot_be_read_is_drawn_as_officially_only_on_request() -> None:
    official = random.Random(42)
    parse = mmmu.OptionSeed42()
    for answer in ("no idea", "B", "no idea", "nothing"):
        found = parse(answer, row("A", PRICES))
        if answer == "B":
            assert (found.value, found.how) == ("B", "exact")
        else:
            assert (found.value, found.how) == (official.choice(["A", "B", "C"]), "none")


@pytest.mark.parametrize(
    ("answer", "truth", "is_right"),
    [
        ("It is 12.97 g", "12.97", 1.0),
        ("12.974", "12.97", 1.0),
        ("The result is 1,000 units", "1000", 1.0),
        ("6.02e23", "6.02e23", 1.0),
        ("x = 4", "4", 1.0),
        ("x = 4.5", "4", 0.0),
        ("It is Mitosis.", ["mitosis", "cell division"], 1.0),
        ("so it is cell division", ["mitosis", "cell division"], 1.0),
        ("meiosis", ["mitosis"], 0.0),
        ("It is 24/7", "['24/7', '3.429']", 1.0),
        ("It is 3.43", "['24/7', '3.429', '3.43]", 1.0),
        ("It is Tampa", "['Miami', 'Orlando']", 0.0),
        ("[0, 5)", "[0, 5)", 1.0),
        ("b", "b", 1.0),
        ("", "b", 0.0),
    ],
)
def test_open_answers(answer: str, truth: object, is_right: float) -> None:
    asked = row(truth)
    found = mmmu.open_answer(answer, asked)
    assert (0.0 if found.value is None else mmmu.open_rule(found.value, asked)) == is_right
