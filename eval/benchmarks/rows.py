"""The files of a benchmark as rows, joined and checked before a model is opened.

Owns what a benchmark's `files` and field names mean. Does not own formats (`eval.entries`, `eval.benchmarks.tables`) or
where pictures lie.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from eval.benchmarks.fields import EMPTY, filled, find, needed
from eval.benchmarks.row import PLACE, Row
from eval.benchmarks.spec import Benchmark
from eval.benchmarks.tables import base64_picture, is_table, read_table
from eval.entries import WrongValueError, parse, read_json
from models.common.errors import InputError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Rows:
    """A benchmark's rows in the order of its files; `digests` are the files' sha256 by name."""

    rows: tuple[Row, ...]
    digests: Mapping[str, str]
    num_repeated: int


def read_rows(benchmark: Benchmark, files: Sequence[str], annotations: str | None = None) -> Rows:
    """Read the files as published.

    Raises:
        InputError: a file is missing or of another format, a row lacks a field, or a key occurs twice.
    """
    if benchmark.form.rule == "captions" and not any(map(is_table, files)):
        return _captions(benchmark, files)
    entries: list[dict[str, Any]] = []
    digests: dict[str, str] = {}
    for file in files:
        found, digests[PurePosixPath(file).name] = _entries(file, benchmark.files.under, benchmark.files.columns)
        entries += [named(benchmark, file, entry) for entry in found]
    if annotations is not None:
        others, digests[PurePosixPath(annotations).name] = _entries(annotations, benchmark.files.annotations_under, ())
        entries = _joined(benchmark, annotations, entries, others)
    return rows_of(benchmark, entries, " and ".join(files), digests)


def rows_of(benchmark: Benchmark, entries: Iterable[dict[str, Any]], where: str, digests: Mapping[str, str]) -> Rows:
    """The rows of entries that are read already; `where` is named in errors."""
    keep = benchmark.files.keep
    kept = [
        each
        for entry in entries
        for each in _exploded(benchmark, entry)
        if all(name not in each or str(each[name]) == str(value) for name, value in keep.items())
    ]
    if not kept:
        raise InputError(f"{where}: no row of {benchmark.title} in it")
    path = Path(where)
    rows = [parse(path, entry, partial(_row, benchmark, place)) for place, entry in enumerate(kept)]
    counts = Counter(row.key for row in rows)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated and not benchmark.repeats:
        raise InputError(f"{where} holds question {'/'.join(repeated[0])} twice")
    return Rows(tuple(rows), dict(digests), len(rows) - len(counts))


def _entries(file: str, under: str | None, columns: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    if is_table(file):
        return read_table(file, columns)
    value, digest = read_json(Path(file))
    return entries_in(file, value, under), digest


def entries_in(file: str, value: Any, under: str | None) -> list[dict[str, Any]]:
    """The list of entries in a JSON value: under a key, under each id, or the value itself."""
    if under not in (None, "*") and isinstance(value, dict) and under in value:
        value = value[under]
    if isinstance(value, dict) and all(isinstance(each, dict) for each in value.values()):
        value = [{"id": key, **each} for key, each in value.items()]
    elif isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise InputError(f"{file}: a list of entries expected{f' under {under!r}' if under else ''}")
    return value


def named(benchmark: Benchmark, file: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with what the file's name says, where it does not say that itself."""
    name = benchmark.files.name_field
    if name is None or name in entry:
        return entry
    found = re.search(benchmark.files.name_pattern, PurePosixPath(file).name.partition(".")[0])
    return {**entry, name: found.group(1)} if found else entry


def _joined(
    benchmark: Benchmark, file: str, entries: list[dict[str, Any]], others: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    name = benchmark.files.join
    if name is None:
        raise InputError(f"{benchmark.title} has no annotations beside its questions: leave {file} out")
    by_id = {str(find(other, name)): other for other in others}
    lacking = [entry for entry in entries if str(find(entry, name)) not in by_id]
    if lacking:
        raise InputError(f"{file} lacks {len(lacking)} of {len(entries)} questions, first {find(lacking[0], name)}")
    return [{**by_id[str(find(entry, name))], **entry} for entry in entries]


def _exploded(benchmark: Benchmark, entry: dict[str, Any]) -> list[dict[str, Any]]:
    names, number = (benchmark.files.explode or "").split("|"), benchmark.files.number
    name = next((each for each in names if isinstance(entry.get(each), list)), None)
    if name is None:
        return [entry]
    return [
        {**entry, name: value, **({number: place} if number else {})}
        for place, value in enumerate(entry[name], start=1)
    ]


def _row(benchmark: Benchmark, place: int, entry: dict[str, Any]) -> Row:
    split = {name: str(entry[name]).split(",") for name in benchmark.files.lists if isinstance(entry.get(name), str)}
    fields = {**entry, **split, **_derived(benchmark, entry)}
    options = _options(benchmark, fields)
    key = tuple(str(needed({**fields, PLACE: place}, name)) for name in benchmark.key) or (str(place),)
    question = benchmark.question if benchmark.form.rule == "captions" else find(fields, benchmark.question)
    return Row(
        key=key,
        question="" if question is None else str(question),
        truth=_truth(benchmark, fields, options),
        picture=_picture(benchmark, fields),
        options=options,
        fields=fields,
    )


def _derived(benchmark: Benchmark, entry: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, how in benchmark.derive.items():
        if name not in entry:
            match = re.search(how.pattern, str(find(entry, how.source)))
            value = how.otherwise if match is None else how.value or match.group(1)
            found |= {} if value is None else {name: value}
    return found


def _options(benchmark: Benchmark, fields: dict[str, Any]) -> dict[str, str]:
    choices = benchmark.choices
    if choices is None:
        return {}
    by_letter = find(fields, choices.by_letter) if choices.by_letter else None
    if isinstance(by_letter, Mapping):
        return {str(letter): str(text) for letter, text in by_letter.items()}
    texts: Any = find(fields, choices.field) if choices.field else None
    if isinstance(texts, str):
        texts = _literal(texts)
    if texts is None and choices.fields:
        texts = [fields[name] for name in choices.fields if fields.get(name) not in (None, *EMPTY)]
    if not texts and choices.count is not None:
        texts = [""] * int(find(fields, choices.count) or 0)
    return dict(zip(LETTERS, map(str, texts or []), strict=False))


def _literal(text: str) -> Any:
    """A list that was written as a text, as MMMU's options are."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise WrongValueError(f"options are {text[:40]!r}, and a list is needed") from None
    return value


def _truth(benchmark: Benchmark, fields: dict[str, Any], options: Mapping[str, str]) -> Any:
    value = (find if benchmark.is_judged else needed)(fields, benchmark.truth)
    if benchmark.form.rule == "captions":
        return [str(text) for text in (value if isinstance(value, list) else [value])]
    if benchmark.truth_entry is not None and isinstance(value, list):
        return [each[benchmark.truth_entry] if isinstance(each, Mapping) else each for each in value]
    if benchmark.truth_is_place and str(value).isdigit():
        if int(value) >= len(options):
            raise WrongValueError(f"the answer is option {value}, counted from 0, and there are {len(options)}")
        return list(options)[int(value)]
    return value


def _picture(benchmark: Benchmark, fields: dict[str, Any]) -> Any:
    value = find(fields, benchmark.picture) if benchmark.picture else None
    if value is None or value is False:
        return None
    inline = base64_picture(value)
    if inline is not None or not isinstance(value, str | int) or value is True:
        return inline or value
    return filled(benchmark.picture_file, fields) if benchmark.picture_file else value


def _captions(benchmark: Benchmark, files: Sequence[str]) -> Rows:
    from eval.splits import read_captions

    rows: list[Row] = []
    digests: dict[str, str] = {}
    for file in files:
        split = read_captions(Path(file))
        digests[PurePosixPath(file).name] = split.digests["captions"]
        rows += [
            Row(
                key=(str(each.image_id),),
                question=benchmark.question,
                truth=list(each.captions),
                picture=each.file_name or each.image_id,
                fields={"image_id": each.image_id, "captions": list(each.captions), "domain": each.domain},
            )
            for each in split.samples
        ]
    return Rows(tuple(rows), digests, 0)
