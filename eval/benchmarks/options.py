"""Parsers of answers that name an option by its letter.

Each follows one published evaluator, named in its docstring; none falls back to a random letter.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping

from eval.benchmarks.row import NOTHING, Parsed, Row

_THE_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
"""The period is any character, as in the published code."""
_BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LAST_WORDS = 4
_SAID = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_DOTTED = re.compile(r"^\s*([A-Z])\.")


def _letters(row: Row) -> str:
    return "".join(row.options) or "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def strict(answer: str, row: Row) -> Parsed:
    """LLaVA's for SEED-Bench: the answer is the letter and nothing else."""
    return Parsed(answer, "exact") if len(answer) == 1 and answer in _letters(row) else NOTHING


def first_letter(answer: str, row: Row) -> Parsed:
    """lmms-eval's for SEED-Bench: the first character, in either case."""
    letter = answer.strip()[:1].upper()
    if not letter or letter not in _letters(row):
        return NOTHING
    return Parsed(letter, "exact" if len(answer.strip()) == 1 else "extracted")


def sqa(answer: str, row: Row) -> Parsed:
    """LLaVA's for ScienceQA: a letter A to E, a letter and ". ", or one match of "The answer is X.".

    haotian-liu/LLaVA, `eval_science_qa.py`. A letter behind the last option is wrong.
    """
    how = "extracted"
    if answer in tuple("ABCDE"):
        letter, how = answer, "exact"
    elif len(answer) >= 3 and answer[0] in "ABCDE" and answer[1:3] == ". ":
        letter = answer[0]
    else:
        found = _THE_ANSWER_IS.findall(answer)
        if len(found) != 1:
            return NOTHING
        letter = found[0]
    if letter not in _letters(row):
        return NOTHING
    return Parsed(letter, "exact" if how == "exact" else "extracted")


def with_text(answer: str, row: Row) -> Parsed:
    """VLMEvalKit's for MMBench, without its judge: one letter among the last words, "answer is X", or an option's text.

    open-compass/VLMEvalKit, `matching_util.py`. A letter must be the only one of all words, and its first place among
    the last four; an answer longer than twice all options together names none by text.
    """
    letters = _letters(row)
    if answer.strip() in tuple(letters):
        return Parsed(answer.strip(), "exact")
    words = answer.translate(_BLANKED).split()
    named = [letter for letter in letters if letter in words]
    if any(refusal in answer for refusal in _REFUSALS) or (not named and "Z" in words):
        return NOTHING
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return Parsed(named[0], "extracted")
    said = _SAID.search(answer)
    if said and said.group(1).upper() in letters:
        return Parsed(said.group(1).upper(), "extracted")
    return _by_text(answer.lower(), {letter: str(option).lower() for letter, option in row.options.items()})


def _by_text(answer: str, options: Mapping[str, str]) -> Parsed:
    found = [letter for letter, option in options.items() if option in answer]
    is_short = len(answer) <= 2 * sum(map(len, options.values()))
    return Parsed(found[0], "extracted") if is_short and len(found) == 1 else NOTHING


def ai2d(answer: str, row: Row) -> Parsed:
    """lmms-eval's for AI2D: a letter and a period at the start, else the whole answer in either case, unpunctuated."""
    found = _DOTTED.match(answer)
    if found:
        return Parsed(found.group(1), "extracted")
    letter = answer.translate(_PUNCTUATION).strip().upper()
    if letter not in tuple(_letters(row)):
        return NOTHING
    return Parsed(letter, "exact" if answer.strip() == letter else "extracted")
