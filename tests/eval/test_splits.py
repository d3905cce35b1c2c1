"""Benchmark files: joined, checked, digested."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from eval.splits import read_captions, read_questions, read_yes_no
from models.common.errors import InputError
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
        ("{", "not valid JSON"),
        ('{"questions": [{"question": "half \\ud83d"}]}', r"half of a character .U.D83D"),
        ("[]", "a mapping with a list 'questions'"),
        ('{"questions": []}', "holds no questions"),
        ('{"questions": [{"question": "What?"}]}', "an entry lacks 'question_id'"),
        ('{"questions": [{"question_id": 0}]}', "an entry lacks 'image_id'"),
        ('{"questions": [3]}', "not an entry of this format: 3"),
        ('{"questions": [{"question_id": 0}, {"question_id": 0}]}', "holds question 0 twice"),
        ('{"questions": [{"question_id": 0}, {"question_id": "0"}]}', "holds question 0 twice"),
        (
            '{"questions": [{"question_id": 0, "image_id": 0, "question": null}]}',
            "'question' is null, and a text is needed",
        ),
        ('{"questions": [{"question_id": 0, "image_id": 0, "question": " "}]}', "'question' is empty"),
        ('{"questions": [{"question_id": 0, "image_id": null, "question": "a"}]}', "'image_id' is null"),
        ('{"questions": [{"question_id": 0, "image": 3, "image_id": 1, "question": "a"}]}', "'image' is 3"),
        ("[" * 100_000, "nested too deeply"),
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
        ([{"file_name": "a.jpg", "caption": None}], "'caption' is null, and a text is needed"),
        ({"images": [{"id": 1}, {"id": "1"}], "annotations": []}, "holds image 1 twice"),
        ({"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": 3}]}, "'caption' is 3"),
    ],
)
def test_bad_captions(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_captions(write(tmp_path / "captions.json", value))


def test_a_number_and_its_text_are_one_id(tmp_path: Path) -> None:
    captions = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": "1", "caption": "a"}]}
    (sample,) = read_captions(write(tmp_path / "captions.json", captions)).samples
    assert (sample.image_id, sample.file_name, sample.captions) == (1, "a.jpg", ("a",))


@needs_data
def test_popes_own_file_is_read() -> None:
    samples = read_yes_no(data("eval", "pope", "coco_pope_random.json")).samples
    assert (samples[0].question, samples[0].label) == ("Is there a snowboard in the image?", True)
    assert {each.label for each in samples} == {True, False}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing.json: no such file"):
        read_captions(tmp_path / "nothing.json")
