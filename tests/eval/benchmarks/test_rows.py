"""A benchmark's files as rows: joined, exploded, named, and what is wrong with them in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.rows import read_rows
from eval.benchmarks.spec import load
from models.common.errors import InputError


def write(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def test_pope_takes_its_category_from_the_files_names(tmp_path: Path) -> None:
    entry = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}
    files = [write(tmp_path / f"coco_pope_{name}.json", entry) for name in ("random", "popular")]
    found = read_rows(load("pope"), files)
    assert [row.key for row in found.rows] == [("random", "1"), ("popular", "1")]
    assert set(found.digests) == {"coco_pope_random.json", "coco_pope_popular.json"}


def test_mme_has_a_file_for_each_category(tmp_path: Path) -> None:
    path = tmp_path / "color.txt"
    path.write_text('a.jpg\tIs it "red"? Please answer yes or no.\tYes\na.jpg\tIs it blue?\tNo\n')
    rows = read_rows(load("mme"), [str(path)]).rows
    assert [row.picture for row in rows] == ["color/a.jpg"] * 2
    assert rows[0].question == 'Is it "red"? Please answer yes or no.'
    assert [row.truth for row in rows] == ["Yes", "No"]


def test_scienceqa_is_one_split_of_a_mapping_with_places_as_truths(tmp_path: Path) -> None:
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": "image.png"}
    file = write(tmp_path / "problems.json", {"4": {**problem, "split": "test"}, "5": {**problem, "split": "train"}})
    (row,) = read_rows(load("scienceqa"), [file]).rows
    assert (row.key, row.truth, row.picture) == (("4",), "B", "test/4/image.png")


def test_vqa_joins_its_two_files(tmp_path: Path) -> None:
    asked = write(tmp_path / "q.json", {"questions": [{"question_id": 1, "image_id": 9, "question": "Which?"}]})
    people = [{"answer": "red"}] * 10
    answered = write(tmp_path / "a.json", {"annotations": [{"question_id": 1, "answers": people}]})
    (row,) = read_rows(load("vqav2"), [asked], answered).rows
    assert (row.truth, row.picture) == (["red"] * 10, 9)
    empty = write(tmp_path / "b.json", {"annotations": [{"question_id": 2, "answers": people}]})
    with pytest.raises(InputError, match="lacks 1 of 1 questions, first 1"):
        read_rows(load("vqav2"), [asked], empty)


def test_each_sentence_of_refcoco_is_a_row(tmp_path: Path) -> None:
    entry = {"question_id": 3, "image": "a.jpg", "bbox": [0, 0, 5, 5], "answer": ["left", "the left one"]}
    rows = read_rows(load("refcoco"), [write(tmp_path / "r.json", [entry])]).rows
    assert [(row.key, row.question) for row in rows] == [(("3", "1"), "left"), (("3", "2"), "the left one")]


def test_mmmus_options_are_a_list_in_a_text(tmp_path: Path) -> None:
    entry = {"id": "validation_Art_Theory_2", "question": "?", "options": "['a', \"b's\"]", "answer": "B"}
    (row,) = read_rows(load("mmmu_val"), [write(tmp_path / "m.json", [entry])]).rows
    assert row.options == {"A": "a", "B": "b's"}
    assert row.fields["subject"] == "Art_Theory"
    with pytest.raises(InputError, match="a list is needed"):
        read_rows(load("mmmu_val"), [write(tmp_path / "m.json", [{**entry, "options": "a, b"}])])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"question_id": 1, "image": "a", "text": "?", "category": "x"}], "label or answer is missing"),
        (
            [{"question_id": 1, "image": "a", "text": "?", "category": "x", "label": "no"}] * 2,
            "holds question x/1 twice",
        ),
        ([], "no row of POPE in it"),
        (3, "a list of entries expected"),
    ],
)
def test_wrong_files_are_one_line(tmp_path: Path, entries: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_rows(load("pope"), [write(tmp_path / "pope.json", entries)])
