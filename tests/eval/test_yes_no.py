"""Yes/no questions by POPE's rule, beside its figures for real answers."""

from __future__ import annotations

import json

import pytest

from eval.yes_no import YesNoScore, is_unclear, is_yes, label_of
from tests.support.paths import data, needs_data


@pytest.mark.parametrize(
    ("answer", "counts_as_yes", "unclear"),
    [
        ("Yes", True, False),
        ("No", False, False),
        ("yes, there is no dog", False, False),
        ("There is not. Yes.", False, False),
        ("Yes. No cat is there.", True, False),
        ("NO", True, True),  # the published rule knows three spellings
        ("a dog", True, True),
        ("", True, True),
    ],
)
def test_the_published_rule(answer: str, counts_as_yes: bool, unclear: bool) -> None:
    assert (is_yes(answer), is_unclear(answer)) == (counts_as_yes, unclear)


def test_labels_in_any_case() -> None:
    assert [label_of(value) for value in ("yes", " No. ", "YES", "maybe", None, 1)] == [
        True,
        False,
        True,
        None,
        None,
        None,
    ]


def test_figures_without_any_yes() -> None:
    assert YesNoScore.of([False, False], [False, False]).figures() == {
        "accuracy": 1.0,
        "precision": None,
        "recall": None,
        "f1": None,
        "yes_share": 0.0,
    }


@needs_data
def test_pope_by_llava_13b_has_the_published_rules_figures() -> None:
    folder = data("eval", "predictions_official", "reference.json").parent
    reference = json.loads((folder / "reference.json").read_text())["pope_llava13b"]["reference"]
    rows = [json.loads(line) for line in (folder / "pope_llava13b.jsonl").read_text().split("\n") if line]
    f1s = []
    for category in ("adversarial", "popular", "random"):
        found = [row for row in rows if row["category"] == category]
        labels = [bool(label_of(row["label"])) for row in found]
        figures = YesNoScore.of([is_yes(row["prediction"]) for row in found], labels).figures()
        assert figures["accuracy"] == pytest.approx(reference[category]["acc"], abs=1e-6)
        assert figures["f1"] == pytest.approx(reference[category]["f1"], abs=1e-6)
        assert figures["yes_share"] == pytest.approx(reference[category]["yes"], abs=1e-4)
        f1s.append(figures["f1"] or 0.0)
    assert sum(f1s) / 3 == pytest.approx(reference["mean_f1"], abs=1e-6)
