"""The files of a benchmark: questions and human answers, or captions, joined and checked before a model is opened.

Owns: reading VQA v2, POPE and COCO caption files (plain or .gz), joining them, and their digests. Does not own images
(`eval.images`) or prompts. Loads without torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eval.entries import ImageId, WrongValueError, file_name_of, id_of, parse, read_json, read_records, text_of
from eval.vqa import VqaItem
from eval.yes_no import label_of
from models.common.errors import InputError


@dataclass(frozen=True)
class QuestionSample:
    """One question about one image, with its human answers."""

    question_id: ImageId
    image_id: ImageId
    file_name: str | None
    question: str
    item: VqaItem


@dataclass(frozen=True)
class CaptionSample:
    """One image and its reference captions."""

    image_id: ImageId
    file_name: str | None
    captions: tuple[str, ...]
    domain: str | None = None
    """NoCaps': in, near or out of the domain of COCO's captions."""


@dataclass(frozen=True)
class YesNoSample:
    """One question about one image whose right answer is yes (`label`) or no."""

    question_id: ImageId
    image_id: ImageId
    file_name: str | None
    question: str
    label: bool
    category: str | None


@dataclass(frozen=True)
class YesNoQuestions:
    """A yes/no split; `digests` are the sha256 of its files, uncompressed."""

    samples: tuple[YesNoSample, ...]
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Questions:
    """A question split; `digests` are the sha256 of its files, uncompressed."""

    samples: tuple[QuestionSample, ...]
    digests: Mapping[str, str]
    num_unused_annotations: int


@dataclass(frozen=True)
class Captions:
    """A caption split; `digests` are the sha256 of its files, uncompressed."""

    samples: tuple[CaptionSample, ...]
    digests: Mapping[str, str]


def read_questions(questions: Path, annotations: Path) -> Questions:
    """Join VQA v2's questions file with its annotations file, in the order of the questions.

    A question may name its image's file as `image` or `file_name`; else `image_id` identifies it.

    Raises:
        InputError: a file is missing, empty or of another format, or a question has no annotation.
    """
    asked, asked_digest = read_records(questions, "questions")
    answered, answered_digest = read_records(annotations, "annotations")
    by_question = _keyed(annotations, answered)
    _keyed(questions, asked)
    lacking = [record["question_id"] for record in asked if str(record["question_id"]) not in by_question]
    if lacking:
        raise InputError(
            f"{len(lacking)} of {len(asked)} questions in {questions} have no annotation in {annotations}, "
            f"the first is question {lacking[0]}"
        )
    samples = [
        parse(questions, record, lambda record: _question_sample(record, by_question[str(record["question_id"])]))
        for record in asked
    ]
    digests = {"questions": asked_digest, "annotations": answered_digest}
    return Questions(tuple(samples), digests, len(by_question) - len(asked))


def _keyed(path: Path, records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Records by their question id as text, as answers are kept; each must have one, and of its own."""
    by_question: dict[str, dict[str, Any]] = {}
    for record in records:
        question_id = str(parse(path, record, lambda record: id_of(record, "question_id")))
        if question_id in by_question:
            raise InputError(f"{path} holds question {question_id} twice")
        by_question[question_id] = record
    return by_question


def _question_sample(asked: dict[str, Any], answered: dict[str, Any]) -> QuestionSample:
    item = VqaItem(
        human_answers=_human_answers(answered),
        answer_type=answered.get("answer_type"),
        question_type=answered.get("question_type"),
    )
    image_id, file_name = id_of(asked, "image_id"), file_name_of(asked)
    return QuestionSample(asked["question_id"], image_id, file_name, text_of(asked, "question"), item)


def _human_answers(answered: dict[str, Any]) -> tuple[str, ...]:
    return tuple(text_of(answer, "answer", may_be_blank=True) for answer in answered["answers"])


def read_yes_no(questions: Path, annotations: Path | None = None) -> YesNoQuestions:
    """Read questions whose answers are yes or no, in the order of the file.

    POPE's format (JSON lines or a list: `image`, `text`, `label`, and `category` where there are several), or VQA v2's
    questions with `annotations` beside, whose most frequent answer is the label.

    Raises:
        InputError: a file is missing, empty or of another format, or a label is neither yes nor no.
    """
    value, digest = read_json(questions)
    digests = {"questions": digest}
    records = value.get("questions", [value]) if isinstance(value, dict) else value
    if not isinstance(records, list) or not records:
        raise InputError(f"{questions}: POPE's format expected, one {{image, text, label}} a line, or VQA v2's")
    labels: dict[str, dict[str, Any]] = {}
    if annotations is not None:
        answered, digests["annotations"] = read_records(annotations, "annotations")
        labels = _keyed(annotations, answered)
    samples = [
        parse(questions, record, partial(_yes_no_sample, place=place, answered=labels))
        for place, record in enumerate(records, start=1)
    ]
    _refuse_twice(questions, [(each.category, str(each.question_id)) for each in samples])
    return YesNoQuestions(tuple(samples), digests)


def _yes_no_sample(record: dict[str, Any], place: int, answered: dict[str, dict[str, Any]]) -> YesNoSample:
    question_id = id_of(record, "question_id") if "question_id" in record else place
    if answered:
        counts = Counter(_human_answers(answered[str(question_id)]) if str(question_id) in answered else ())
        if not counts:
            raise WrongValueError(f"question {question_id} has no annotation")
        found: Any = counts.most_common(1)[0][0]
    else:
        found = record["label"] if "label" in record or "answer" not in record else record["answer"]
    label = label_of(found)
    if label is None:
        raise WrongValueError(f"question {question_id}: its label is {found!r}, neither yes nor no")
    file_name = file_name_of(record)
    image_id = id_of(record, "image_id") if file_name is None or "image_id" in record else file_name
    question = text_of(record, "text" if "text" in record else "question")
    category = record.get("category")
    return YesNoSample(question_id, image_id, file_name, question, label, None if category is None else str(category))


def _refuse_twice(path: Path, keys: Sequence[tuple[str | None, str]]) -> None:
    for (category, key), count in Counter(keys).items():
        if count > 1:
            raise InputError(f"{path} holds question {key} {f'of {category} ' if category else ''}twice")


def read_captions(path: Path) -> Captions:
    """Read captions in COCO's format ({images, annotations}) or as a list of {file_name, caption}.

    Images are in the order of the file, each with all its captions.

    Raises:
        InputError: the file is missing, empty or of another format, or a caption is of an image it does not list.
    """
    value, digest = read_json(path)
    if isinstance(value, dict) and isinstance(value.get("annotations"), list):
        samples = _coco_samples(path, value)
    elif isinstance(value, list):
        samples = _listed_samples(path, value)
    else:
        raise InputError(
            f"{path}: COCO captions ({{images, annotations}}) or a list of {{file_name, caption}} expected"
        )
    if not samples:
        raise InputError(f"{path} holds no captions")
    return Captions(tuple(samples), {"captions": digest})


def _coco_samples(path: Path, value: dict[str, Any]) -> list[CaptionSample]:
    ids: dict[str, ImageId] = {}
    names: dict[ImageId, str | None] = {}
    domains: dict[ImageId, str] = {}
    for image in value.get("images", []):
        image_id, name = parse(path, image, lambda image: (id_of(image, "id"), file_name_of(image)))
        if str(image_id) in ids:
            raise InputError(f"{path} holds image {image_id} twice")
        ids[str(image_id)] = image_id
        names[image_id] = name
        domains |= {image_id: str(image["domain"])} if image.get("domain") is not None else {}
    captions: dict[ImageId, list[str]] = {image_id: [] for image_id in names}
    for record in value["annotations"]:
        image_id, caption = parse(path, record, lambda record: (id_of(record, "image_id"), text_of(record, "caption")))
        if names and str(image_id) not in ids:
            raise InputError(f"{path} has a caption of image {image_id}, which is not among its images")
        captions.setdefault(ids.setdefault(str(image_id), image_id), []).append(caption)
    bare = [image_id for image_id, texts in captions.items() if not texts]
    if bare:
        raise InputError(f"{path}: {len(bare)} images have no caption, the first is image {bare[0]}")
    return [
        CaptionSample(image_id, names.get(image_id), tuple(texts), domains.get(image_id))
        for image_id, texts in captions.items()
    ]


def _listed_samples(path: Path, records: list[Any]) -> list[CaptionSample]:
    captions: dict[str, list[str]] = {}
    for record in records:
        name, caption = parse(path, record, lambda record: (text_of(record, "file_name"), text_of(record, "caption")))
        captions.setdefault(name, []).append(caption)
    return [CaptionSample(file_name, file_name, tuple(texts)) for file_name, texts in captions.items()]
