"""Predictions that were made elsewhere: their files as entries, and which answer belongs to which row.

    LLaVA           JSONL of {question_id, prompt, text}; where the id is a picture's, joined by picture and question
    lmms-eval       samples, JSONL of {doc_id, filtered_resps, input}; joined by `doc`'s own fields where it is there
    VLMEvalKit      table (xlsx, TSV, CSV) with `prediction`
    MME             CATEGORY.txt with the answer in a fourth column
    COCO            list of {image_id, caption}
    DocVQA          list of {questionId, answer}
    MM-Vet          mapping from id to answer
    ours            OUT.NAME.jsonl of an evaluation

Owns those forms. Does not own what is right (`eval.benchmarks`). A row without an answer is an error, never wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.fields import find
from eval.benchmarks.row import PLACE, Row
from eval.benchmarks.rows import named
from eval.benchmarks.scoring import picture_name
from eval.benchmarks.spec import Benchmark
from eval.benchmarks.tables import is_table, read_table
from eval.entries import read_json
from models.common.errors import InputError

ALONE = ("prediction", "response", "pred_answer", "pred", "predict")
"""Where the answer stands in entries that have the question and its truth as well."""
BESIDE = (*ALONE, "text", "caption", "answer")
"""Where it stands in files of answers alone."""
PROMPT = "prompt"
"""The field of LLaVA's answers that holds what was asked."""
ASKED = "#asked"
"""The field of entries that know no more than what was asked."""
_PICTURE = re.compile(r"<image( \d+)?>")


def read_predictions(file: str, benchmark: Benchmark) -> tuple[list[dict[str, Any]], str]:
    """The entries of a file, each flat, and its digest; raises InputError where it is of none of these forms."""
    if is_table(file):
        entries, digest = read_table(file, benchmark.files.columns)
        return [named(benchmark, file, entry) for entry in entries], digest
    value, digest = read_json(Path(file))
    if isinstance(value, dict) and ("filtered_resps" in value or find(value, _names(benchmark, BESIDE)) is not None):
        value = [value]
    elif isinstance(value, dict) and not all(isinstance(each, dict) for each in value.values()):
        value = next((each for each in value.values() if isinstance(each, list)), None) or [
            {"id": key, "prediction": answer} for key, answer in value.items()
        ]
    elif isinstance(value, dict):
        value = [{"id": key, **each} for key, each in value.items()]
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise InputError(f"{file}: answers expected, an entry each")
    return [_flat(entry) for entry in value], digest


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """lmms-eval's and our own samples hold the question's entry inside."""
    if isinstance(entry.get("doc"), dict):
        answers = _first(entry.get("filtered_resps") or entry.get("resps"))
        place = {PLACE: entry["doc_id"]} if isinstance(entry.get("doc_id"), int) else {}
        return {**place, **entry["doc"], "prediction": answers}
    if isinstance(entry.get("doc_id"), int) and "filtered_resps" in entry:
        return {PLACE: entry["doc_id"], "prediction": _first(entry["filtered_resps"]), ASKED: entry.get("input")}
    if isinstance(entry.get("row"), dict):
        return {**entry["row"], "prediction": entry.get("answer")}
    return entry


def _first(answers: Any) -> Any:
    while isinstance(answers, list) and answers:
        answers = answers[0]
    return answers


def _names(benchmark: Benchmark, names: Sequence[str]) -> str:
    return "|".join([*([benchmark.answer] if benchmark.answer else []), *names])


def answer_in(entry: dict[str, Any], benchmark: Benchmark, names: Sequence[str], where: str) -> str:
    """The answer of an entry as a text; a cell that is empty, or null, is an empty answer.

    Raises:
        InputError: it has no such field.
    """
    fields = _names(benchmark, names)
    value = find(entry, fields)
    if value is None and any(name in entry for name in fields.split("|")):
        return ""
    if value is None:
        raise InputError(f"{where}: an entry has no answer ({' or '.join(names)}): {str(entry)[:100]}")
    return value if isinstance(value, str) else str(value)


def answers_to(rows: Sequence[Row], entries: Sequence[dict[str, Any]], benchmark: Benchmark, where: str) -> list[str]:
    """The answer to each row: by its key, by picture and question, or by position where the file lacks both.

    Raises:
        InputError: a row without an answer, two answers to one row, or another number of entries than of rows.
    """
    if entries and all(ASKED in entry for entry in entries):
        return _by_place(rows, entries, benchmark, where)
    if pictures := _pictures_of(rows, entries):
        return _by_picture(rows, entries, pictures, benchmark, where)
    keys = [tuple(_text(find(entry, name)) for name in benchmark.key) for entry in entries]
    if benchmark.form.rule == "captions":
        keys = [(_text(find(entry, "image_id|id")),) for entry in entries]
    if keys and all("" not in key for key in keys) and keys[0] and not benchmark.repeats:
        return _by_key(rows, dict(zip(keys, entries, strict=True)), len(entries), benchmark, where)
    if len(entries) != len(rows):
        raise InputError(
            f"{where} has {len(entries)} answers to {len(rows)} questions, and names no {' and '.join(benchmark.key)}"
        )
    for row, key, entry in zip(rows, keys, entries, strict=True):
        is_named = all(part in ("", own) for part, own in zip(key, row.key, strict=False))
        is_asked = PROMPT in entry and _is_asked(row, entry[PROMPT], benchmark)
        if not (is_named or is_asked):
            raise InputError(
                f"{where}: answers are in another order than the questions: {_said(key)} stands where {row.name} is"
            )
    return [answer_in(entry, benchmark, BESIDE, where) for entry in entries]


def _said(key: tuple[str, ...]) -> str:
    return "/".join(part for part in key if part) or "another question"


def _pictures_of(rows: Sequence[Row], entries: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """The places of the rows by picture, where LLaVA's answers name pictures instead of rows, as in TextVQA and MME."""
    if not all(isinstance(entry.get(PROMPT), str) and entry.get("question_id") for entry in entries):
        return {}
    found: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        found.setdefault(_stem(picture_name(row) or ""), []).append(place)
    names = {_stem(entry["question_id"]) for entry in entries}
    return found if names <= found.keys() and not names & {"/".join(row.key) for row in rows} else {}


def _by_picture(
    rows: Sequence[Row],
    entries: Sequence[dict[str, Any]],
    pictures: dict[str, list[int]],
    benchmark: Benchmark,
    where: str,
) -> list[str]:
    """An answer belongs to the row of its picture whose question its prompt holds; the longest one, and the first."""
    by_place: dict[int, dict[str, Any]] = {}
    for entry in entries:
        left = [place for place in pictures[_stem(entry["question_id"])] if place not in by_place]
        asked = [place for place in left if _is_asked(rows[place], entry[PROMPT], benchmark)]
        if not asked:
            raise InputError(
                f"{where}: no question is left of picture {entry['question_id']} that {entry[PROMPT][:60]!r} asks"
            )
        by_place[max(asked, key=lambda place: len(rows[place].question))] = entry
    missing = [row for place, row in enumerate(rows) if place not in by_place]
    if missing:
        raise InputError(f"{where} lacks {len(missing)} of {len(rows)} answers, the first is to {missing[0].name}")
    return [answer_in(by_place[place], benchmark, BESIDE, where) for place in range(len(rows))]


def _stem(name: Any) -> str:
    """A picture's name without what a file's name ends with."""
    return re.sub(r"\.(jpe?g|png|webp)$", "", str(name), flags=re.IGNORECASE)


def _by_key(
    rows: Sequence[Row], by_key: dict[tuple[str, ...], dict[str, Any]], count: int, benchmark: Benchmark, where: str
) -> list[str]:
    if len(by_key) < count:
        raise InputError(f"{where}: {count - len(by_key)} questions are answered twice")
    missing = [row for row in rows if row.key not in by_key]
    if missing:
        raise InputError(f"{where} lacks {len(missing)} of {len(rows)} answers, the first is to {missing[0].name}")
    if count > len(rows):
        raise InputError(f"{where} has {count} answers to {len(rows)} questions: is it another split's?")
    return [answer_in(by_key[row.key], benchmark, BESIDE, where) for row in rows]


def _by_place(rows: Sequence[Row], entries: Sequence[dict[str, Any]], benchmark: Benchmark, where: str) -> list[str]:
    """lmms-eval's samples without their docs: by `doc_id`, where what was asked holds the question at that place."""
    by_place = {entry[PLACE]: entry for entry in entries}
    if len(by_place) < len(entries):
        raise InputError(f"{where}: {len(entries) - len(by_place)} questions are answered twice")
    if set(by_place) != set(range(len(rows))):
        raise InputError(f"{where} has answers to {len(entries)} documents, and there are {len(rows)} questions")
    found = [by_place[place] for place in range(len(rows))]
    others = [row for row, entry in zip(rows, found, strict=True) if not _is_asked(row, entry[ASKED], benchmark)]
    if others:
        raise InputError(
            f"{where}: {len(others)} of {len(rows)} documents ask something else than the questions, the first at "
            f"{others[0].name}: is it another table, or another order?"
        )
    return [answer_in(entry, benchmark, BESIDE, where) for entry in found]


def _is_asked(row: Row, asked: Any, benchmark: Benchmark) -> bool:
    """lmms-eval changes the case of some questions, takes what `replace` names out, and writes MMMU's pictures anew."""
    question = row.question
    for old, new in benchmark.form_of(row.fields).replace.items():
        question = question.replace(old, new)
    said, meant = (_PICTURE.sub("", text).lower() for text in (str(asked), question))
    return not isinstance(asked, str) or " ".join(meant.split()) in " ".join(said.split())


def _text(value: Any) -> str:
    return "" if value is None else str(value)
