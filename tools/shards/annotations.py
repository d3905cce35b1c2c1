"""Annotation files of the field -> samples: COCO captions, and questions (VQAv2, TextVQA, VizWiz).

Owns joining their tables and finding pictures by their ids. The formats of one flat table are in `tools.shards.raw`.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.images import PICTURE_EXTENSIONS
from models.errors import InputError
from models.spec import IMAGE_TOKEN
from tools.shards.raw import RawSample, captioned, existing

Asked = tuple[str, Any, Any, str]
"""(where it stands, the picture's id or name, question, answer) as a file has it."""


def read_coco(path: Path, images: Path, prompt: str) -> list[RawSample]:
    """COCO's `captions_*.json`: one sample for each caption, in the file's order.

    Raises:
        InputError: another shape, or a picture (named) that is missing.
    """
    content = _tables(path, ("images", "annotations"))
    names = {row.get("id"): row.get("file_name") for row in content["images"]}
    found = []
    for number, row in enumerate(content["annotations"]):
        where = f"{path}: annotation {number}"
        name, caption = names.get(row.get("image_id")), row.get("caption")
        if not isinstance(name, str) or not isinstance(caption, str):
            raise InputError(f"{where} has no caption, or its image_id {row.get('image_id')!r} is not among the images")
        found.append(captioned(existing(images, name, where), caption.strip(), prompt))
    return found


def read_vqa(files: Sequence[Path], images: Path, prompt: str) -> list[RawSample]:
    """One conversation for each picture with all its questions, each answered by what most annotators said.

    `prompt` follows the first question on a line of its own, as in LLaVA-1.5's mixture ("Answer the question using a
    single word or phrase.").

    Args:
        files: VQA's questions and annotations; or the one file of TextVQA or VizWiz, which holds both.

    Raises:
        InputError: another shape, a question without an answer, or a picture (named) that is missing.
    """
    rows = _joined(*files) if len(files) == 2 else _single(files[0])
    places = _by_id(images)
    asked: dict[Any, list[tuple[str, str]]] = defaultdict(list)
    for where, picture, question, answer in rows:
        if not answer or not isinstance(question, str):
            raise InputError(f"{where} has no text, or no answer")
        if not isinstance(picture, str | int) or picture not in places:
            raise InputError(f"{where}: no picture for {picture!r} in {images}")
        asked[picture].append((question, answer))
    return [
        RawSample((places[picture],), record={"id": picture, "conversations": _conversation(pairs, prompt)})
        for picture, pairs in asked.items()
    ]


def _joined(questions: Path, annotations: Path) -> Iterator[Asked]:
    """VQA's two files, joined by `question_id`."""
    answers = {row.get("question_id"): _answer(row) for row in _tables(annotations, ("annotations",))["annotations"]}
    for number, row in enumerate(_tables(questions, ("questions",))["questions"]):
        where = f"{questions}: question {number} ({row.get('question_id')})"
        yield where, row.get("image_id"), row.get("question"), answers.get(row.get("question_id"), "")


def _single(path: Path) -> Iterator[Asked]:
    """TextVQA's {"data": [{image_id, question, answers: [text]}]} or VizWiz's [{image, question, answers: [{answer}]}].

    VizWiz's questions that cannot be answered are kept: their answer is "unanswerable", as most annotators said.
    """
    content = _json(path)
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "question" in row for row in rows):
        raise InputError(
            f"{path} is neither TextVQA's file nor VizWiz's; VQA's format takes two, questions and annotations"
        )
    for number, row in enumerate(rows):
        yield f"{path}: question {number}", row.get("image_id", row.get("image")), row["question"], _answer(row)


def _conversation(pairs: Sequence[tuple[str, str]], prompt: str) -> list[dict[str, str]]:
    turns = []
    for place, (question, answer) in enumerate(pairs):
        text = "\n".join(part for part in (IMAGE_TOKEN, question, prompt) if part) if place == 0 else question
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return turns


def _answer(row: Mapping[str, Any]) -> str:
    """The given majority answer, or the most frequent of the annotators'; the earlier one where two tie."""
    given = row.get("multiple_choice_answer")
    if isinstance(given, str) and given:
        return given
    answers = row.get("answers") or []
    texts = [answer.get("answer", "") if isinstance(answer, dict) else answer for answer in answers]
    found = Counter(text.strip() for text in texts if isinstance(text, str))
    return found.most_common(1)[0][0] if found else ""


def _by_id(images: Path) -> dict[Any, Path]:
    """A folder's pictures by file name, by stem, and by a stem's last number (9 for COCO_train2014_000000000009)."""
    if not images.is_dir():
        raise InputError(f"no directory {images}")
    found: dict[Any, Path] = {}
    for path in sorted(images.iterdir()):
        if path.suffix.lower().lstrip(".") in PICTURE_EXTENSIONS:
            number = path.stem.rsplit("_", 1)[-1]
            found |= {path.name: path, path.stem: path} | ({int(number): path} if number.isdigit() else {})
    return found


def _tables(path: Path, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The named lists of a JSON object."""
    content = _json(path)
    for name in names:
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path} holds no list `{name}`; expected an object with {', '.join(names)}")
    return {name: content[name] for name in names}


def _json(path: Path) -> Any:
    """A JSON file, which may be gzipped."""
    try:
        payload = path.read_bytes()
        return json.loads(gzip.decompress(payload) if path.suffix == ".gz" else payload)
    except FileNotFoundError:
        raise InputError(f"no file {path}") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
