"""Answers to yes/no questions, as POPE scores them: accuracy, precision, recall, F1 and the share of yes.

Owns: what counts as no, and the figures of a set. Does not own files, prompts or models (`eval.tasks.yes_no`).

The rule is that of POPE (https://github.com/RUCAIBox/POPE, `evaluate.py`), which LLaVA's `eval_pope.py` uses too: an
answer is no where one of the words of its first sentence, without commas, is `No`, `no` or `not`, and yes otherwise. So
an answer that says neither counts as yes; how many do is counted beside the figures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_NO_WORDS = frozenset({"No", "no", "not"})
_YES = re.compile(r"\byes\b", re.IGNORECASE)

FIGURES = ("accuracy", "precision", "recall", "f1", "yes_share")


@dataclass(frozen=True)
class YesNoScore:
    """Counts of a set of answers: true or false is whether it agrees with the label, yes or no what was answered."""

    true_yes: int
    false_yes: int
    true_no: int
    false_no: int

    @classmethod
    def of(cls, answers: Sequence[bool], labels: Sequence[bool]) -> YesNoScore:
        """The counts of answers beside the right ones."""
        pairs = list(zip(answers, labels, strict=True))
        return cls(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, False), (False, True))))

    @property
    def num_answers(self) -> int:
        """How many were counted."""
        return self.true_yes + self.false_yes + self.true_no + self.false_no

    def figures(self) -> dict[str, float | None]:
        """The `FIGURES`, as shares; None where nothing is there to divide by. F1 without any true yes is 0."""
        num_yes, num_right_yes = self.true_yes + self.false_yes, self.true_yes + self.false_no
        return {
            "accuracy": (self.true_yes + self.true_no) / self.num_answers,
            "precision": self.true_yes / num_yes if num_yes else None,
            "recall": self.true_yes / num_right_yes if num_right_yes else None,
            "f1": 2 * self.true_yes / (num_yes + num_right_yes) if num_yes + num_right_yes else None,
            "yes_share": num_yes / self.num_answers,
        }


def is_yes(answer: str) -> bool:
    """What an answer counts as, by POPE's rule."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not _NO_WORDS.intersection(words)


def is_unclear(answer: str) -> bool:
    """Whether an answer counts as yes without saying so."""
    return is_yes(answer) and _YES.search(answer) is None


def label_of(value: object) -> bool | None:
    """A label as a file holds it: yes or no in any case, with space or a period around; None where it is neither."""
    return {"yes": True, "no": False}.get(str(value).strip().rstrip(".").lower())
