"""What a benchmark's YAML may say, and finding it by its name.

Owns the values only: strict, so that a misspelt key is an error. What parsers and rules are called stands in their
tables; a name that is not there is an error as well. Each YAML has its source and the published figures beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from eval.benchmarks.figures import Figure, Sum
from eval.benchmarks.parsers import PARSERS
from eval.benchmarks.rules import RULES
from models.common.errors import InputError
from models.spec import Config

_FOLDER = Path(__file__).with_name("data")

SUFFIXES = {
    "none": "",
    "short": "\nAnswer the question using a single word or phrase.",
    "letter": "\nAnswer with the option's letter from the given choices directly.",
    "vizwiz": (
        "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    ),
    "one_word": "\nAnswer the question with a single word.",
}
"""What is put behind a question, by name; each begins with a newline."""

Names = tuple[str, ...]
Suffix = Literal["none", "short", "letter", "vizwiz", "one_word"]


class Files(Config):
    """How a benchmark's files become rows.

    Args:
        under: the key that holds the rows; `*` is a mapping whose keys are ids, which become the field `id`.
        columns: of tables without a header.
        name_field, name_pattern: a field that a file's name tells, and the pattern whose first group it is.
        join: fields that the annotations beside have, too; their other fields are added.
        explode: a list in each row, of which each entry becomes a row; `a|b` is the first of them that is there.
        keep: only rows whose fields have these values.
    """

    under: str | None = None
    columns: Names = ()
    name_field: str | None = None
    name_pattern: str = "(.+)"
    join: str | None = None
    annotations_under: str | None = None
    """As `under`, of the file that is joined."""
    explode: str | None = None
    number: str | None = None
    """With `explode`: the field that gets the entry's number, from 1."""
    keep: Mapping[str, Any] = Field(default_factory=dict)
    lists: Names = ()
    """Fields that are lists, where a file has them as a text with commas."""


class Derived(Config):
    """A field made of another one: a pattern's first group; `otherwise` where it does not match."""

    source: str
    pattern: str
    value: str | None = None
    otherwise: str | None = None


class Options(Config):
    """Where the options stand: a list (or the text of one), or a field each; they get the letters A, B, C, …"""

    field: str | None = None
    fields: Names = ()
    by_letter: str | None = None
    """A mapping from letters to texts."""
    count: str | None = None
    """The number of options, where a file of predictions has no texts."""


class Form(Config):
    """How a question is asked, parsed and scored. `ask` may name fields in braces."""

    ask: str = "{question}"
    replace: Mapping[str, str] = Field(default_factory=dict)
    """Texts that are taken out of the question, or changed, before it is asked."""
    suffix: Suffix = "none"
    options: Literal["lines", "none"] = "none"
    """Whether the options stand below the question, `A. text` one a line."""
    parse: str
    rule: str

    @field_validator("parse")
    @classmethod
    def _is_parser(cls, name: str) -> str:
        if name not in PARSERS:
            raise ValueError(f"no parser {name!r}; there are {', '.join(PARSERS)}")
        return name

    @field_validator("rule")
    @classmethod
    def _is_rule(cls, name: str) -> str:
        if name not in RULES and name != "captions":
            raise ValueError(f"no rule {name!r}; there are captions, {', '.join(RULES)}")
        return name

    def with_parser(self, name: str) -> Form:
        """The same with another parser; raises InputError where there is none of that name."""
        if name not in PARSERS:
            raise InputError(f"no parser {name!r}; there are {', '.join(PARSERS)}")
        return self.model_copy(update={"parse": name})


class Published(Config):
    """A published figure and where it stands."""

    model: str
    figure: str
    value: float
    source: str


class Benchmark(Config):
    """A benchmark. A field of a row is named as `a|b.c`: the first of a and c in b that is there."""

    title: str
    source: str
    version: Annotated[int, Field(gt=0)] = 1
    """Rises with every change that changes a figure."""
    files: Files = Field(default_factory=Files)
    key: Names = ()
    """The fields that identify a row, `#` for its place; without, its place does."""
    repeats: bool = False
    """Whether a key may occur twice in the published file; each is counted."""
    question: str = "question"
    picture: str | None = None
    """The field that names the picture: a file, an id, or the picture itself."""
    picture_file: str | None = None
    """The picture's file in the folder, with fields in braces, where its name is made of several."""
    truth: str = "answer"
    truth_entry: str | None = None
    """Where truths are objects: the key of the text in them."""
    truth_is_place: bool = False
    """Whether a number as the truth counts the options from 0."""
    answer: str | None = None
    """Where files of predictions have the answer under a name of this benchmark's own."""
    derive: Mapping[str, Derived] = Field(default_factory=dict)
    choices: Options | None = None
    form: Form
    variants: Mapping[str, Form] = Field(default_factory=dict)
    """Forms of rows whose field `variant_by` has that value."""
    variant_by: str | None = None
    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    cluster: Names = ()
    """The fields that say which rows are drawn together; without, the picture does."""
    is_judged: bool = False
    """Whether a judge's verdicts are scored, not answers."""
    figures: tuple[Figure, ...] = ()
    sums: tuple[Sum, ...] = ()
    caption_groups: Names = ()
    """Fields by whose values captions are also scored, each group as a set of its own."""
    headline: str
    published: tuple[Published, ...] = ()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The figures over all rows that a result has, the headline first."""
        if self.form.rule == "captions":
            return ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
        found = [name for figure in self.figures for name in figure.metric_names]
        found += [each.name for each in self.sums if not each.by_group]
        return tuple(dict.fromkeys([self.headline, *found]))

    @property
    def truth_source(self) -> str:
        """The field of a file that the truth is, or is made of."""
        return self.derive[self.truth].source if self.truth in self.derive else self.truth

    def form_of(self, fields: Mapping[str, Any]) -> Form:
        """How the row with these fields is asked and scored."""
        if self.variant_by is None:
            return self.form
        return self.variants.get(str(fields.get(self.variant_by)), self.form)


@cache
def names() -> tuple[str, ...]:
    """The benchmarks that there are."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


@cache
def load(name: str) -> Benchmark:
    """A benchmark by its name.

    Raises:
        InputError: no such benchmark.
    """
    if name not in names():
        raise InputError(f"no benchmark {name!r}; there are {', '.join(names())}")
    path = _FOLDER / f"{name}.yaml"
    try:
        return Benchmark.model_validate_json(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8"))))
    except ValidationError as error:
        raise InputError(f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None
