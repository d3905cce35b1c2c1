"""Annotation files of the field -> samples: COCO captions, and questions (VQAv2, TextVQA, VizWiz).

Owns joining their tables and finding images by their ids. The formats of one flat table are in `tools.shards.raw`.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.images import IMAGE_EXTENSIONS
from models.common.documents import parse
from models.common.errors import InputError
from models.spec import IMAGE_TOKEN
from tools.shards.raw import RawSample, captioned, collect, existing

Asked = tuple[str, Any, Any, str]
"""(where it stands, the image's id or name, question, answer) as a file has it."""


def read_coco(path: Path, images: Path, prompt: str) -> list[RawSample]:
    """COCO's `captions_*.json`: one sample for each caption, in the file's order.

    Raises:
        InputError: another shape, or an image (named) that is missing.
    """
    content = _tables(path, ("images", "annotations"))
    names = _keyed(path, content["images"], "id", lambda row: row.get("file_name"))

    def read(row: Mapping[str, Any], where: str) -> RawSample:
        name, caption = names.get(_id(row.get("image_id"))), row.get("caption")
        if not isinstance(name, str) or not isinstance(caption, str):
            raise InputError(f"{where} has no caption, or its image_id {row.get('image_id')!r} is not among the images")
        return captioned(existing(images, name, where), caption.strip(), prompt, where)

    return collect(((row, f"{path}: annotation {n}") for n, row in enumerate(content["annotations"])), read)


def read_vqa(files: Sequence[Path], images: Path, prompt: str) -> list[RawSample]:
    """One conversation for each image with all its questions, each with the annotators' majority answer.

    `prompt` follows the first question on a line of its own, as in LLaVA-1.5's mixture ("Answer the question using a
    single word or phrase.").

    Args:
        files: VQA's questions and annotations; or the one file of TextVQA or VizWiz, which holds both.

    Raises:
        InputError: another shape, a question without an answer, or an image (named) that is missing.
    """
    rows = _joined(*files) if len(files) == 2 else _single(files[0])
    places = _by_id(images)
    asked: dict[Any, list[tuple[str, str]]] = defaultdict(list)
    bad = []
    for where, image, question, answer in rows:
        problem = ""
        if not answer or not isinstance(question, str):
            problem = f"{where} has no text, or no answer"
        elif _id(image) is None or image not in places:
            problem = f"{where}: no image for {image!r} in {images}"
        elif len(found := places[image]) > 1:
            problem = f"{where}: {image!r} may be {found[0].name} or {found[1].name} in {images}; name the file"
        if problem:
            bad.append(RawSample((), where=where, problem=problem))
        else:
            asked[image].append((question, answer))
    good = [
        RawSample(
            (places[image][0],),
            record={"id": image, "conversations": _conversation(pairs, prompt)},
            where=f"{files[0]}: image {image!r}",
        )
        for image, pairs in asked.items()
    ]
    return good + bad


def _joined(questions: Path, annotations: Path) -> Iterator[Asked]:
    """VQA's two files, joined by `question_id`."""
    answers = _keyed(annotations, _tables(annotations, ("annotations",))["annotations"], "question_id", _answer)
    for number, row in enumerate(_tables(questions, ("questions",))["questions"]):
        where = f"{questions}: question {number} ({row.get('question_id')})"
        yield where, row.get("image_id"), row.get("question"), answers.get(_id(row.get("question_id")), "")


def _single(path: Path) -> Iterator[Asked]:
    """TextVQA's {"data": [{image_id, question, answers: [text]}]} or VizWiz's [{image, question, answers: [{answer}]}].

    VizWiz's questions that cannot be answered are kept: their answer is "unanswerable", the majority answer.
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


def _by_id(images: Path) -> dict[Any, list[Path]]:
    """A folder's images by file name, by stem, and by a stem's last number (9 for COCO_train2014_000000000009).

    More than one where the id does not say which is meant.
    """
    if not images.is_dir():
        raise InputError(f"no directory {images}")
    found: dict[Any, list[Path]] = defaultdict(list)
    for path in sorted(images.iterdir()):
        if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS:
            number = path.stem.rsplit("_", 1)[-1]
            for name in {path.name, path.stem} | ({int(number)} if number.isascii() and number.isdigit() else set()):
                found[name].append(path)
    return found


def _id(value: Any) -> int | str | None:
    """An id as a file has it; None for what is none."""
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _keyed(path: Path, rows: Sequence[Mapping[str, Any]], key: str, value: Callable[[Any], Any]) -> dict[Any, Any]:
    """What `value` makes of each row, by its id; an id of two rows that differ says nothing.

    Raises:
        InputError: such an id.
    """
    found: dict[Any, Any] = {}
    for row in rows:
        name, made = _id(row.get(key)), value(row)
        if name is not None and found.setdefault(name, made) != made:
            raise InputError(f"{path}: {key} {name!r} comes twice, with {found[name]!r} and {made!r}")
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
    """The value in a JSON file, which may be gzipped; InputError where it is missing or broken."""
    try:
        payload = path.read_bytes()
        return parse(gzip.decompress(payload) if path.suffix == ".gz" else payload, path)
    except FileNotFoundError:
        raise InputError(f"no file {path}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
