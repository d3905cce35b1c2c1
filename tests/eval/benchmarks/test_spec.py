"""Every benchmark that is shipped: it decodes, its names are there, and its form makes a question."""

from __future__ import annotations

import pytest

from eval.benchmarks import spec
from eval.benchmarks.asking import prompt_of
from eval.benchmarks.row import Row
from models.common.errors import InputError


@pytest.mark.parametrize("name", spec.names())
def test_every_benchmark_decodes_and_has_its_headline(name: str) -> None:
    found = spec.load(name)
    assert found.headline in found.metric_names
    assert found.source
    assert all(each.figure in found.metric_names for each in found.published)


def test_an_unknown_one_is_named_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match=r"no benchmark 'popes'; there are ai2d, .*pope"):
        spec.load("popes")


def test_what_is_asked_is_the_published_prompt() -> None:
    short = "Answer the question using a single word or phrase."
    letter = "Answer with the option's letter from the given choices directly."
    asked = {
        "pope": (Row((), "Is there a dog?", ""), f"Is there a dog?\n{short}"),
        "mme": (Row((), "Is it a dog? Please answer yes or no.", ""), f"Is it a dog?\n{short}"),
        "scienceqa": (
            Row((), "Which?", "", options={"A": "a", "B": "b"}, fields={"hint": "Look."}),
            f"Context: Look.\nWhich?\nA. a\nB. b\n{letter}",
        ),
        "mmbench_dev": (Row((), "Which?", "", options={"A": "a"}, fields={"hint": None}), f"Which?\nA. a\n{letter}"),
        "textvqa_ocr": (
            Row((), "What?", "", fields={"ocr_tokens": ["a", "b"]}),
            f"What?\nReference OCR token: a, b\n{short}",
        ),
        "mmmu_val": (Row((), "How many?", "", fields={"question_type": "open"}), f"How many?\n{short}"),
    }
    for name, (row, prompt) in asked.items():
        assert prompt_of(spec.load(name), row) == prompt
