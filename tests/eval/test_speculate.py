"""What `eval.speculate` asks, and of which models it can be asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval.speculate import _parse, _queries, _shown, measure
from models.common.errors import InputError
from tests.support.benchmarks import TinyBenchmark


def arguments(tiny: TinyBenchmark, *more: object) -> Any:
    return _parse(["bundle", "--images", str(tiny.images), *map(str, more)])


def test_each_image_is_asked_the_prompt(tiny: TinyBenchmark) -> None:
    queries = _queries(arguments(tiny, "--prompt", "What?", "--limit", 2))
    assert [(len(query.images), query.turns[0].text) for query in queries] == [(1, "What?")] * 2


def test_questions_of_a_file_are_asked_of_their_images(tiny: TinyBenchmark) -> None:
    queries = _queries(arguments(tiny, "--questions", tiny.questions))
    asked = [question["question"] for question in json.loads(tiny.questions.read_text())["questions"]]
    assert [query.turns[0].text for query in queries] == asked


def test_what_cannot_be_asked_is_named(tiny: TinyBenchmark, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        _queries(_parse(["bundle", "--images", str(tmp_path / "absent")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image in it"):
        _queries(_parse(["bundle", "--images", str(tmp_path / "empty")]))
    with pytest.raises(InputError, match="no questions in VQA v2's format"):
        _queries(arguments(tiny, "--questions", tiny.captions))


def test_a_model_without_heads_is_refused() -> None:
    plain: Any = SimpleNamespace(speculation=None)
    with pytest.raises(InputError, match="has no heads for future tokens"):
        measure(plain, [], 4)


def test_figures_are_shown_on_a_line() -> None:
    assert _shown({"greedy": 1.0, "always": [0.25, 3]}) == "greedy 1.000, always 0.250, 3"
