"""The files of a benchmark: questions and human answers, or captions, joined and checked before a model is opened.

Owns: reading VQA v2 and COCO caption files (plain or .gz), joining them, and their digests. Does not own pictures
(`eval.pictures`) or prompts. Loads without torch.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from eval.vqa import VqaItem
from models.errors import InputError

T = TypeVar("T")
ImageId = int | str


@dataclass(frozen=True)
class QuestionSample:
    """One question about one picture, with the people's answers."""

    question_id: ImageId
    image_id: ImageId
    file_name: str | None
    question: str
    item: VqaItem


@dataclass(frozen=True)
class CaptionSample:
    """One picture and its reference captions."""

    image_id: ImageId
    file_name: str | None
    captions: tuple[str, ...]


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

    A question may name its picture's file as `image` or `file_name`; else `image_id` says which it is.

    Raises:
        InputError: a file is missing, empty or of another format, or a question has no annotation.
    """
    asked, asked_digest = _read_records(questions, "questions")
    answered, answered_digest = _read_records(annotations, "annotations")
    by_question = _keyed(annotations, answered)
    _keyed(questions, asked)
    lacking = [record["question_id"] for record in asked if record["question_id"] not in by_question]
    if lacking:
        raise InputError(
            f"{len(lacking)} of {len(asked)} questions in {questions} have no annotation in {annotations}, "
            f"the first is question {lacking[0]}"
        )
    samples = [
        _parse(questions, record, lambda record: _question_sample(record, by_question[record["question_id"]]))
        for record in asked
    ]
    digests = {"questions": asked_digest, "annotations": answered_digest}
    return Questions(tuple(samples), digests, len(by_question) - len(asked))


def _keyed(path: Path, records: Sequence[dict[str, Any]]) -> dict[ImageId, dict[str, Any]]:
    """Records by their question id; each must have one, and of its own."""
    by_question: dict[ImageId, dict[str, Any]] = {}
    for record in records:
        question_id = _parse(path, record, lambda record: record["question_id"])
        if question_id in by_question:
            raise InputError(f"{path} holds question {question_id} twice")
        by_question[question_id] = record
    return by_question


def _question_sample(asked: dict[str, Any], answered: dict[str, Any]) -> QuestionSample:
    item = VqaItem(
        human_answers=tuple(str(answer["answer"]) for answer in answered["answers"]),
        answer_type=answered.get("answer_type"),
        question_type=answered.get("question_type"),
    )
    file_name = asked.get("image", asked.get("file_name"))
    return QuestionSample(asked["question_id"], asked["image_id"], file_name, asked["question"], item)


def read_captions(path: Path) -> Captions:
    """Read captions in COCO's format ({images, annotations}) or as a list of {file_name, caption}.

    Pictures stand in the order of the file, each with all its captions.

    Raises:
        InputError: the file is missing, empty or of another format, or a caption is of a picture it does not list.
    """
    value, digest = _read_json(path)
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
    names: dict[ImageId, str | None] = {
        _parse(path, image, lambda image: image["id"]): image.get("file_name") for image in value.get("images", [])
    }
    captions: dict[ImageId, list[str]] = {image_id: [] for image_id in names}
    for record in value["annotations"]:
        image_id, caption = _parse(path, record, lambda record: (record["image_id"], record["caption"]))
        if names and image_id not in names:
            raise InputError(f"{path} has a caption of image {image_id}, which is not among its images")
        captions.setdefault(image_id, []).append(caption)
    bare = [image_id for image_id, texts in captions.items() if not texts]
    if bare:
        raise InputError(f"{path}: {len(bare)} images have no caption, the first is image {bare[0]}")
    return [CaptionSample(image_id, names.get(image_id), tuple(texts)) for image_id, texts in captions.items()]


def _listed_samples(path: Path, records: list[Any]) -> list[CaptionSample]:
    captions: dict[str, list[str]] = {}
    for record in records:
        file_name, caption = _parse(path, record, lambda record: (record["file_name"], record["caption"]))
        captions.setdefault(file_name, []).append(caption)
    return [CaptionSample(file_name, file_name, tuple(texts)) for file_name, texts in captions.items()]


def _parse(path: Path, record: Any, parse: Callable[[Any], T]) -> T:
    try:
        return parse(record)
    except KeyError as error:
        raise InputError(f"{path}: an entry lacks {error.args[0]!r}: {_shown(record)}") from None
    except (TypeError, AttributeError):
        raise InputError(f"{path}: not an entry of this format: {_shown(record)}") from None


def _shown(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False)[:120]


def _read_records(path: Path, key: str) -> tuple[list[dict[str, Any]], str]:
    """The non-empty list under `key`, as VQA v2's files hold it, and the file's digest."""
    value, digest = _read_json(path)
    records = value.get(key) if isinstance(value, dict) else None
    if not isinstance(records, list):
        raise InputError(f"{path}: VQA v2's format expected, a mapping with a list {key!r}")
    if not records:
        raise InputError(f"{path} holds no {key}")
    return records, digest


def _read_json(path: Path) -> tuple[Any, str]:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError) as error:
        raise InputError(f"{path} can't be read: {error}") from None
    if not content.strip():
        raise InputError(f"{path} is empty")
    try:
        return json.loads(content), hashlib.sha256(content).hexdigest()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
