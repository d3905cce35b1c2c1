"""VQA accuracy, as published: ten human answers, two ways of normalising text.

Owns: the text normalisations, the accuracy of one answer and of a set, by answer type and by question type.
Does not own files, prompts or models (`eval.tasks.vqa`).

    `official`  normalises only where the human answers differ from each other (GT-Vision-Lab/VQA, vqaEval.py)
    `evalai`    always normalises, and drops commas and question marks first (mmf's EvalAIAnswerProcessor, which
                LLaVA and lmms-eval use for TextVQA and VizWiz)

Figures are comparable within one normalisation only. The published code's quirks are kept, each named below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from models.common.errors import InputError

Normalisation = Literal["official", "evalai"]

MIN_HUMAN_ANSWERS = 4
"""With fewer, even a unanimous answer can't reach 100 %: three OTHER people must have given it."""

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
"""Published as `(?!<=\\d)(\\.)(?!\\d)`: the first group is a misspelt look-behind that never fails, so a period
goes unless a digit FOLLOWS it."""
_MAX_PERIODS = 32
"""The published call is `sub("", text, re.UNICODE)`: the flag, 32, lands in the argument `count`."""

_CONTRACTION_TABLE = """
aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've
hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's
howd=how'd howll=how'll hows=how's isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll
maam=ma'am mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've mightve=might've
mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't
ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've
shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've
somebody'd=somebodyd somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll
somebodys=somebody's someoned=someone'd someoned've=someone'd've someone'dve=someone'd've
someonell=someone'll someones=someone's somethingd=something'd somethingd've=something'd've
something'dve=something'd've somethingll=something'll thats=that's thered=there'd
thered've=there'd've there'dve=there'd've therere=there're theres=there's theyd=they'd
theyd've=they'd've they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas
wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've werent=weren't whatll=what'll whatre=what're
whats=what's whatve=what've whens=when's whered=where'd wheres=where's whereve=where've whod=who'd
whod've=who'd've who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're
whys=why's wont=won't wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've
wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've
y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've you'dve=you'd've youll=you'll
youre=you're youve=you've
"""
# The published table. Text is lower-case by then, so its five entries with a capital I never apply, and its
# identities change nothing: both are left out.
_CONTRACTIONS = dict(pair.split("=") for pair in _CONTRACTION_TABLE.split())


@dataclass(frozen=True)
class VqaItem:
    """One question's human answers (in the file's order) and the groups that it is counted in."""

    human_answers: tuple[str, ...]
    answer_type: str | None = None
    question_type: str | None = None


@dataclass(frozen=True)
class VqaScore:
    """Accuracies in per cent, and each question's own accuracy in [0, 1], in the items' order."""

    accuracy: float
    by_answer_type: dict[str, float]
    by_question_type: dict[str, float]
    per_item: tuple[float, ...]


def without_punctuation(text: str) -> str:
    """Drop a mark that touches a space anywhere (all marks, where a comma joins digits), else blank it."""
    stripped = text
    has_digit_comma = _DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if touches_space or has_digit_comma else " ")
    return _PERIOD.sub("", stripped, count=_MAX_PERIODS)


def _unify_words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophe."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=2**16)
def normalise_official(text: str) -> str:
    """An answer as vqaEval.py normalises it where the human answers are not unanimous."""
    return _unify_words(without_punctuation(_one_line(text)))


@lru_cache(maxsize=2**16)
def normalise_evalai(text: str) -> str:
    """An answer as mmf's EvalAIAnswerProcessor normalises it."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise_official(words.strip())


def _official_texts(answer: str, human_answers: Sequence[str]) -> tuple[str, list[str]]:
    humans = [_one_line(human) for human in human_answers]
    if len(set(humans)) == 1:
        return _one_line(answer), humans
    return normalise_official(answer), [normalise_official(human) for human in humans]


def _evalai_texts(answer: str, human_answers: Sequence[str]) -> tuple[str, list[str]]:
    return normalise_evalai(answer), [normalise_evalai(human) for human in human_answers]


_TEXTS: dict[Normalisation, Callable[[str, Sequence[str]], tuple[str, list[str]]]] = {
    "official": _official_texts,
    "evalai": _evalai_texts,
}
_DECIMALS: dict[Normalisation, int | None] = {"official": 2, "evalai": None}
"""vqaEval.py rounds per cents to two places; mmf does not round."""


def check_human_answers(human_answers: Sequence[str], where: str) -> None:
    """Raise InputError, which begins with `where`, for fewer than four answers, with which 100 % can't be reached."""
    if len(human_answers) < MIN_HUMAN_ANSWERS:
        raise InputError(
            f"{where} needs at least {MIN_HUMAN_ANSWERS} human answers (VQA v2 has 10), "
            f"found {len(human_answers)}; where one answer is right, take --task yes_no for yes and no, else write it "
            "ten times and take --normalisation evalai"
        )


def answer_accuracy(answer: str, human_answers: Sequence[str], normalisation: Normalisation) -> float:
    """Accuracy in [0, 1] of one answer: the mean over annotators of min(1, matches among the OTHERS / 3).

    So 0, 1, 2, 3, 4+ matching annotators of ten give 0, 0.3, 0.6, 0.9, 1. "The others" are told apart by their
    place in the list: the published code compares whole dictionaries, where equal answers without an
    `answer_id` would vanish.

    Raises:
        InputError: fewer than four human answers, with which 100 % can't be reached.
    """
    check_human_answers(human_answers, "VQA accuracy")
    text, humans = _TEXTS[normalisation](answer, human_answers)
    matches = [human == text for human in humans]
    num_matches = sum(matches)
    return sum(min(1.0, (num_matches - own) / 3) for own in matches) / len(matches)


def _percent_by(groups: Sequence[str | None], values: Sequence[float], decimals: int | None) -> dict[str, float]:
    members: dict[str, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        if group is not None:
            members.setdefault(group, []).append(value)
    return {group: _percent(members[group], decimals) for group in sorted(members)}


def _percent(values: Sequence[float], decimals: int | None) -> float:
    percent = 100 * math.fsum(values) / len(values)
    return percent if decimals is None else round(percent, decimals)


def score(items: Mapping[str, VqaItem], answers: Mapping[str, str], normalisation: Normalisation) -> VqaScore:
    """Accuracy of `answers` on `items`, both keyed by question id; every item must have an answer.

    Raises:
        InputError: no items at all, an item without an answer, or an item with too few human answers.
    """
    if not items:
        raise InputError("no questions to score")
    missing = [key for key in items if key not in answers]
    if missing:
        raise InputError(f"{len(missing)} of {len(items)} questions have no answer, the first is {missing[0]}")
    per_item = []
    for key, item in items.items():
        try:
            per_item.append(answer_accuracy(answers[key], item.human_answers, normalisation))
        except InputError as error:
            raise InputError(f"question {key}: {error}") from None
    decimals = _DECIMALS[normalisation]
    return VqaScore(
        accuracy=_percent(per_item, decimals),
        by_answer_type=_percent_by([item.answer_type for item in items.values()], per_item, decimals),
        by_question_type=_percent_by([item.question_type for item in items.values()], per_item, decimals),
        per_item=tuple(per_item),
    )
