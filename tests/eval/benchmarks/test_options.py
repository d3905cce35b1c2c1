"""Letters of options as the official evaluators read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from eval.benchmarks import options
from eval.benchmarks.ranked import ranked
from eval.benchmarks.row import Parsed, Row
from tests.eval.benchmarks.rows import row

ANIMALS = {"A": "a cat", "B": "a dog", "C": "a dogfish"}


@pytest.mark.parametrize(
    ("parse", "answer", "letter"),
    [
        (options.strict, "B", "B"),
        (options.strict, "B.", None),
        (options.strict, "D", None),
        (options.first_letter, "b) a dog", "B"),
        (options.first_letter, "", None),
        (options.sqa, "B", "B"),
        (options.sqa, "B. a dog", "B"),
        (options.sqa, "B.", None),
        (options.sqa, "b", None),
        (options.sqa, "D", None),
        (options.sqa, "Look. The answer is C.", "C"),
        (options.sqa, "The answer is A. The answer is C.", None),
        (options.sqa, "The answer is B, as it barks", "B"),
        (options.sqa, "The answer is B", None),
        (options.with_text, "(B)", "B"),
        (options.with_text, "The answer is B.", "B"),
        (options.with_text, "A or B", None),
        (options.with_text, "A is what I see in the middle of it all", None),
        (options.with_text, "it is a cat", "A"),
        (options.with_text, "it is a dogfish", None),
        (options.with_text, "a cat " * 20, None),
        (options.with_text, "B it is, it is", None),
        (options.with_text, "so B it is, I", "B"),
        (options.with_text, "A or B: a cat", "A"),
        (options.with_text, "The correct answer is **B**, and A is not", "B"),
        (options.with_text, "Z: a cat", None),
        (options.with_text, "Cannot determine the answer: a cat", None),
        (ranked, "B) a dog", "B"),
        (ranked, "It must be C", "C"),
        (ranked, "the answer is (B), not more", "B"),
        (ranked, "(A) no, (B) yes", "B"),
        (ranked, "(B) looks like A. but no", "B"),
        (ranked, "the answer is B, for Any dog barks", "A"),
        (ranked, "perhaps aBc", "B"),
        (ranked, "nothing", None),
        (options.ai2d, " B. a dog", "B"),
        (options.ai2d, "b", "B"),
        (options.ai2d, "(B)", "B"),
        (options.ai2d, "B a dog", None),
    ],
)
def test_the_letter_of_an_answer(parse: Callable[[str, Row], Parsed], answer: str, letter: str | None) -> None:
    found = parse(answer, row("A", ANIMALS))
    assert found.value == letter
    assert (found.how == "none") == (letter is None)
