"""MMMU's parsers and its rule for open questions, after the official `eval_utils.py` (MMMU-Benchmark/MMMU).

Owns both halves. `option` counts what it cannot read as wrong; the official code draws a letter there, which
`OptionSeed42` repeats so that published figures can be had.
"""

from __future__ import annotations

import random
import re

from eval.benchmarks.row import NOTHING, Parsed, Row

_STRIPPED = ",.!?;:'"
_MIN_WORDS = 5
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_SENTENCES = re.compile(r"\.\s(?=[A-Z])|\n")
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")


def option(answer: str, row: Row) -> Parsed:
    """A letter in brackets, else between blanks, else an option's text in a longer answer; of several the last one."""
    text = answer
    for mark in _STRIPPED:
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} "):
        places = {letter: text.rfind(form.format(letter)) for letter in row.options}
        if max(places.values(), default=-1) >= 0:
            letter = max(places, key=lambda letter: places[letter])
            return Parsed(letter, "exact" if answer.strip() == letter else "extracted")
    if len(text.split()) > _MIN_WORDS:
        lower = text.lower()
        places = {letter: lower.rfind(str(content).lower()) for letter, content in row.options.items()}
        if max(places.values(), default=-1) >= 0:
            return Parsed(max(places, key=lambda letter: places[letter]), "extracted")
    return NOTHING


class OptionSeed42:
    """`option`, and the official code's draw where nothing is found: `random.choice` after `random.seed(42)`, in order.

    The draws depend on the order of the rows, so it is made anew for each set of answers.
    """

    def __init__(self) -> None:
        self._random = random.Random(42)

    def __call__(self, answer: str, row: Row) -> Parsed:
        """A letter in any case; where it was drawn, `how` is none."""
        found = option(answer, row)
        return found if found.value is not None else Parsed(self._random.choice(list(row.options)), "none")


def open_answer(answer: str, _: Row) -> Parsed:
    """The texts and numbers that an answer to an open question may mean; numbers are rounded to two places."""
    response = answer.strip().strip(".").lower()
    if not response:
        return NOTHING
    # Lower case first, so a capital never follows a period: line feeds alone end sentences, as in the official code.
    sentences = _SENTENCES.split(response)
    keys = []
    for number, sentence in enumerate(sentences):
        indicators = (*_INDICATORS, "=") if number == len(sentences) - 1 else _INDICATORS
        tails = [sentence.split(each)[-1].strip() for each in indicators if each in sentence]
        key = _shortest(tails)
        if key and key not in _TRIVIAL:
            keys.append(key)
    texts = keys or [response]
    values = [*texts, *(number for text in texts for pattern in _NUMBERS for number in pattern.findall(text))]
    return Parsed(tuple(value for text in values for value in normalised(text)), "extracted" if keys else "exact")


def _shortest(tails: list[str]) -> str:
    """The first of the shortest; an empty one is overwritten by the next, as in the official code."""
    found = ""
    for tail in tails:
        if not found or len(tail) < len(found):
            found = tail
    return found


def normalised(text: str) -> list[str | float]:
    """A number rounded to two places, else the text in lower case; one character gets a blank before or behind."""
    stripped = text.strip()
    try:
        return [round(float(stripped.replace(",", "")), 2)]
    except ValueError:
        lower = stripped.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def open_rule(value: tuple[str | float, ...], row: Row) -> float:
    """1 where a right text is contained in one of the values, or a number is equal."""
    right = [each for truth in _truths(row.truth) for each in normalised(str(truth))]
    for found in value:
        if isinstance(found, str):
            if any(isinstance(each, str) and each in found for each in right):
                return 1.0
        elif found in right:
            return 1.0
    return 0.0


def _truths(truth: object) -> list[object]:
    """Several right answers are a list, and in the hub's table the text of one, of which one lacks its last quote."""
    if isinstance(truth, list | tuple):
        return list(truth)
    text = str(truth).strip()
    if text.startswith("['") and text.endswith("]"):
        return [each.strip("'") for each in text[1:-1].split(", ")]
    return [truth]
