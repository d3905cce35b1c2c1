"""Benchmark files: joined, checked, digested."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from eval.splits import read_captions, read_questions
from models.errors import InputError
from tests.support.benchmarks import TinyBenchmark, write
from tests.support.paths import data, needs_data


def test_gz_and_plain_files_are_the_same_split(tiny: TinyBenchmark) -> None:
    zipped = tiny.folder / "questions.json.gz"
    zipped.write_bytes(gzip.compress(tiny.questions.read_bytes()))
    assert read_questions(zipped, tiny.annotations) == read_questions(tiny.questions, tiny.annotations)


def test_coco_and_listed_captions_hold_the_same(tiny: TinyBenchmark) -> None:
    coco = read_captions(tiny.captions)
    rows = [{"file_name": each.file_name, "caption": text} for each in coco.samples for text in each.captions]
    listed = read_captions(write(tiny.folder / "listed.json", rows))
    assert [(each.file_name, each.captions) for each in listed.samples] == [
        (each.file_name, each.captions) for each in coco.samples
    ]


@needs_data
def test_real_files() -> None:
    split = read_questions(
        data("eval", "vizwiz", "val_questions_vqa_format.json.gz"),
        data("eval", "vizwiz", "val_annotations_vqa_format.json.gz"),
    )
    assert (len(split.samples), split.num_unused_annotations) == (4319, 0)
    captions = read_captions(data("eval", "coco_captions_val2017_subset.json.gz")).samples
    assert (len(captions), sum(len(each.captions) for each in captions)) == (4719, 23609)
    assert len(read_captions(data("coco_captions", "captions.json")).samples) == 1723


def test_a_question_without_annotation_is_named(tiny: TinyBenchmark) -> None:
    write(tiny.annotations, {"annotations": [{"question_id": 0, "answers": [{"answer": "red"}] * 10}]})
    with pytest.raises(InputError, match=r"3 of 4 questions in .*questions.json have no annotation .* question 1$"):
        read_questions(tiny.questions, tiny.annotations)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "is not JSON"),
        ("[]", "a mapping with a list 'questions'"),
        ('{"questions": []}', "holds no questions"),
        ('{"questions": [{"question": "What?"}]}', "an entry lacks 'question_id'"),
        ('{"questions": [{"question_id": 0}]}', "an entry lacks 'image_id'"),
        ('{"questions": [3]}', "not an entry of this format: 3"),
        ('{"questions": [{"question_id": 0}, {"question_id": 0}]}', "holds question 0 twice"),
    ],
)
def test_bad_questions(tiny: TinyBenchmark, text: str, message: str) -> None:
    tiny.questions.write_text(text)
    with pytest.raises(InputError, match=message):
        read_questions(tiny.questions, tiny.annotations)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "holds no captions"),
        ({"images": []}, "COCO captions"),
        ({"images": [{"id": 1}], "annotations": []}, "1 images have no caption, the first is image 1"),
        (
            {"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "a"}]},
            "image 2, which is not among its images",
        ),
        ([{"caption": "a"}], "an entry lacks 'file_name'"),
    ],
)
def test_bad_captions(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_captions(write(tmp_path / "captions.json", value))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing.json: no such file"):
        read_captions(tmp_path / "nothing.json")
