"""lmms-eval's reader of letters for RealWorldQA: every form a letter may stand in, and the surest form's last one.

EvolvingLMMs-Lab/lmms-eval, `tasks/_task_utils/mcq_extract.py`. Its quirks are kept: a phrase such as "the answer is"
names any capital of a letter behind it, also inside of a word, and without any form a letter anywhere counts.
"""

from __future__ import annotations

from collections.abc import Iterator

from eval.benchmarks.row import NOTHING, Parsed, Row

_STRIPPED = ",.!?;:'\""
_FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
"""A letter's form and how sure it is."""
_START, _END, _PHRASE, _ANYWHERE = 10, 9, 7, 0
_KINDS = ("answer is", "correct answer is", "best answer is", "correct option is", "best option is")
_PHRASES = (
    *(f"{article}{kind}" for kind in (*_KINDS, "choice is", "correct choice is") for article in ("", "the ")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)

_Found = tuple[int, int, str]
"""How sure, where, and which letter."""


def ranked(answer: str, row: Row) -> Parsed:
    """A letter at the start, else at the end, else behind "answer is", else (X), X., X:, X), X and a blank."""
    stripped = answer.strip()
    letters = "".join(row.options) or "ABCD"
    if stripped in tuple(letters):
        return Parsed(stripped, "exact")
    for mark in _STRIPPED:
        stripped = stripped.strip(mark)
    text = f" {stripped} "
    found = [*_in_forms(text, letters), *_behind_phrases(text, letters), *_at_ends(text.strip(), letters)]
    found = found or [(_ANYWHERE, text.rfind(letter), letter) for letter in letters if letter in text]
    if not found:
        return NOTHING
    return Parsed(max(found, key=lambda each: each[:2])[2], "extracted")


def _in_forms(text: str, letters: str) -> Iterator[_Found]:
    for form, sureness in _FORMS:
        for letter in letters:
            place = text.rfind(form.format(letter))
            if place >= 0:
                yield sureness, place, letter


def _behind_phrases(text: str, letters: str) -> Iterator[_Found]:
    lower = text.lower()
    for phrase in _PHRASES:
        start = lower.find(phrase)
        places = {letter: text.find(letter, start + len(phrase)) for letter in letters} if start >= 0 else {}
        yield from ((_PHRASE, place, letter) for letter, place in places.items() if place >= 0)


def _at_ends(text: str, letters: str) -> Iterator[_Found]:
    for letter in letters:
        if text.startswith(letter) and not text[1:2].isalpha():
            yield _START, 0, letter
        if text.endswith(letter) and not text[-2:-1].isalpha():
            yield _END, len(text), letter
