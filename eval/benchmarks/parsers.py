"""Parsers: what an answer says, and how that was found.

Owns yes/no, plain texts, verdicts and the table of all parsers. A quirk of official code is a parser of its own name,
never a flag. Nothing is drawn at random: what cannot be read is `NOTHING`, which no rule counts as right.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from eval.benchmarks import boxes, mathvista, mmmu, options
from eval.benchmarks.ranked import ranked
from eval.benchmarks.row import NOTHING, Parsed, Row
from eval.vqa import without_punctuation
from eval.yes_no import is_unclear, is_yes

Parser = Callable[[str, Row], Parsed]

_REAL_WORLD_LETTER = re.compile(r"[A-D]")


def yes_no_official(answer: str, _: Row) -> Parsed:
    """POPE's and LLaVA's: no where the first sentence has a word No, no or not; yes otherwise, even if it says neither.

    RUCAIBox/POPE, `evaluate.py`.
    """
    value = "yes" if is_yes(answer) else "no"
    if answer.strip().lower().rstrip(".") == value:
        return Parsed(value, "exact")
    return Parsed(value, "none" if is_unclear(answer) else "extracted")


def yes_no_prefix4(answer: str, _: Row) -> Parsed:
    """MME's: the whole answer, else yes and then no within its first four characters.

    BradyFU/Awesome-Multimodal-Large-Language-Models, `calculation.py`.
    """
    text = answer.lower()
    if text in ("yes", "no"):
        return Parsed(text, "exact")
    return next((Parsed(word, "extracted") for word in ("yes", "no") if word in text[:4]), NOTHING)


def yes_no_words(answer: str, _: Row) -> Parsed:
    """VLMEvalKit's: one of the words yes and no, without VQA's punctuation, and not the other (`yorn.py`)."""
    words = without_punctuation(answer.lower()).split()
    found = {"yes", "no"}.intersection(words)
    if len(found) != 1:
        return NOTHING
    return Parsed(found.pop(), "exact" if len(words) == 1 else "extracted")


def text(answer: str, _: Row) -> Parsed:
    """The answer as it is, without blanks around."""
    stripped = answer.strip()
    return Parsed(stripped, "exact") if stripped else NOTHING


def text_raw(answer: str, _: Row) -> Parsed:
    """The answer as it is."""
    return Parsed(answer, "exact") if answer.strip() else NOTHING


def text_gqa(answer: str, _: Row) -> Parsed:
    """LLaVA's for GQA: lower case, without periods at the end (`convert_gqa_for_eval.py`)."""
    value = answer.rstrip(".").lower()
    return Parsed(value, "exact") if value else NOTHING


def real_world_qa(answer: str, row: Row) -> Parsed:
    """A letter where the truth is one, else the text without a period at the end."""
    if _REAL_WORLD_LETTER.fullmatch(str(row.truth).strip()):
        return ranked(answer, row)
    value = answer.strip().rstrip(".").lower()
    return Parsed(value, "exact") if value else NOTHING


def score_value(answer: str, _: Row) -> Parsed:
    """A judge's verdict, a number."""
    try:
        return Parsed(float(answer), "exact")
    except ValueError:
        return NOTHING


PARSERS: dict[str, Parser | type[mmmu.OptionSeed42]] = {
    "option.mmmu_seed42": mmmu.OptionSeed42,
    "yes_no.official": yes_no_official,
    "yes_no.prefix4": yes_no_prefix4,
    "yes_no.words": yes_no_words,
    "option.strict": options.strict,
    "option.sqa": options.sqa,
    "option.first_letter": options.first_letter,
    "option.with_text": options.with_text,
    "option.ranked": ranked,
    "option.ai2d": options.ai2d,
    "option.mmmu": mmmu.option,
    "mmmu_open": mmmu.open_answer,
    "mathvista": mathvista.parse,
    "box.unit": boxes.unit,
    "box.thousand": boxes.thousand,
    "box.pixels": boxes.pixels,
    "box.padded_square": boxes.padded_square,
    "text": text,
    "text.raw": text_raw,
    "text.gqa": text_gqa,
    "real_world_qa": real_world_qa,
    "score": score_value,
}


def make_parser(name: str) -> Parser:
    """The parser of that name, for one set of answers in their order."""
    found = PARSERS[name]
    return found() if isinstance(found, type) else found
