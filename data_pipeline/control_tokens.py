"""Control tokens spelled out in a user's text stay text, in training as in serving.

Owns which tokens those are, and the marks around them. Does not own encoding (`tokens`).

transformers does the same in `apply_chat_template(..., sanitize_control_tokens=True)`: it wraps what a message spells
in two private characters before the template is rendered, and encodes what lies between them without added tokens. The
marks here are transformers' own (utils/chat_template_utils.py), so that a template sees the same text on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from models.common.errors import InputError
from models.spec import IMAGE_TOKEN

MARK_START, MARK_END = "\U000f0000", "\U000f0001"


def split_marked(text: str) -> list[str]:
    """Text and marked tokens in turn, text first and last: the odd places are to be encoded without added tokens."""
    pieces = [""]
    for piece in re.split(f"([{MARK_START}{MARK_END}])", text):
        if (piece == MARK_START and len(pieces) % 2) or (piece == MARK_END and not len(pieces) % 2):
            pieces.append("")
        elif piece not in (MARK_START, MARK_END):
            pieces[-1] += piece
    return pieces if len(pieces) % 2 else [*pieces, ""]


@dataclass(frozen=True)
class ControlTokens:
    """The tokens of a vocabulary that only a template may write."""

    names: frozenset[str]

    @classmethod
    def of(cls, special: Iterable[str], added: Iterable[str], template: str) -> ControlTokens:
        """Special tokens always; another added token (`<think>`) where the template's text spells it.

        Args:
            template: the bundle's chat template, in Jinja; empty where there is none.

        As in transformers, whitespace is text whoever adds it (Gemma's line feeds). The image token is not among them:
        in a record it stands for an image, and `record.check_turns` counts it.
        """
        written = _literal_text(template)
        spelt = {token for token in added if token in written and not token.isspace()}
        return cls(frozenset({*special, *spelt}) - {IMAGE_TOKEN})

    def without(self, kept: Iterable[str]) -> ControlTokens:
        """The same but for tokens that keep their meaning.

        Raises:
            InputError: one of them is no control token here.
        """
        for token in kept:
            if token not in self.names:
                raise InputError(
                    f"data.control_tokens: {token!r} is no control token of this tokenizer and template; there are "
                    + ", ".join(sorted(self.names))
                )
        return ControlTokens(self.names - set(kept))

    def mark(self, text: str) -> str:
        """The text with every control token that it spells between marks; marks already in it are dropped."""
        text = text.replace(MARK_START, "").replace(MARK_END, "")
        return self._pattern.sub(f"{MARK_START}\\g<0>{MARK_END}", text)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.names, key=lambda name: (-len(name), name))
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nothing


class _Generation(Extension):
    """The tag `generation`, by which transformers' templates name what the assistant says: its body, parsed."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 reads it from the class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements up to `endgeneration`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def syntax_tree(template: str) -> nodes.Template:
    """A chat template's syntax, with the tags that transformers knows.

    Raises:
        InputError: it is not Jinja.
    """
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        return environment.parse(template)
    except TemplateSyntaxError as error:
        raise InputError(f"the chat template is not Jinja: line {error.lineno}: {error.message}") from None


def _literal_text(template: str) -> str:
    """What a Jinja template itself spells, its constants apart from one another."""
    tree = syntax_tree(template)
    texts = {node.data for node in tree.find_all(nodes.TemplateData)}
    texts |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return "\0".join(texts)
