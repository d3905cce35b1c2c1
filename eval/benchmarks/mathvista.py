"""MathVista's extraction without a judge, and its normalisation (lupantech/MathVista, `calculate_score.py`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from eval.benchmarks.distance import edit_distance
from eval.benchmarks.row import NOTHING, Parsed, Row

_LETTER = re.compile(r"\(([a-zA-Z])\)")
_SAID = re.compile(r'The answer is "(.*)"\.')


def parse(answer: str, row: Row) -> Parsed:
    """The answer in the form of the truth: a choice, an integer, a rounded number or a text.

    A text that is no choice becomes the nearest one by edit distance, the first of equals: so a wrong text is always
    some choice, as officially.
    """
    kept = row.fields.get("extraction", answer)
    if "extraction" in row.fields and (kept is None or str(kept) == answer):
        extraction, how = kept, "exact"
    else:
        found = _SAID.search(answer)
        extraction, how = (found.group(1), "extracted") if found else (answer.strip(), "exact")
    value = _normalised(extraction, row)
    return NOTHING if value is None else Parsed(value, "extracted" if how == "extracted" else "exact")


def _normalised(extraction: Any, row: Row) -> str | None:
    """An extraction that a file holds may be a number, a list or null."""
    if row.fields.get("question_type") == "multi_choice":
        return _choice(str(extraction).strip(), list(row.options.values()))
    try:
        match row.fields.get("answer_type"):
            case "integer":
                return str(int(float(extraction)))
            case "float":
                precision = row.fields.get("precision")
                return str(round(float(extraction), None if precision is None else int(precision)))
            case _:
                return str(extraction)
    except (ValueError, OverflowError, TypeError):
        return None


def _choice(extraction: str, choices: Sequence[str]) -> str:
    found = _LETTER.findall(extraction)
    text = found[0].upper() if found else extraction
    letters = [chr(ord("A") + place) for place in range(len(choices))]
    if text in letters:
        return choices[letters.index(text)]
    distances = [edit_distance(text, choice) for choice in choices]
    return choices[distances.index(min(distances))]
