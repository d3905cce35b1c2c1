"""The tokenizer's own chat template, split into segments.

Owns the template that goes into a bundle (the tokenizer's own, with content lists made strings, the begin token and the
date settled), rendering it by transformers itself, and finding the assistant's turns in its output.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes

from data_pipeline.control_tokens import syntax_tree
from data_pipeline.record import Turn
from data_pipeline.tokens import Segment, Tokens
from models.common.errors import InputError, single_line
from models.spec import IMAGE_TOKEN

_FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set body = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set body.text = message['content'] -%}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}"
    "{%- set body.text = body.text + '<image>' + ('' if loop.last else '\\n') -%}"
    "{%- elif part['type'] == 'text' -%}{%- set body.text = body.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': body.text}] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)
"""Content lists to strings: a text model's template does not support images."""

_DATE = "strftime_now"
"""transformers' function for the present date, in the format it is given."""


_ANY_DAY = "2000-01-01"
_CONTENT = "\ue000"
"""Stands for a user's text: a private character, which no template prints itself."""


@dataclass(frozen=True)
class OwnTemplate:
    """See `templates.Template`; `OwnTemplate.of` makes one, checked."""

    tokens: Tokens
    prefix: str = ""
    """Jinja before the tokenizer's own template: begin token, opening, the date where the template asks for it."""
    is_models: bool = False
    """Whether it is that of a vision-language model, which takes images as parts of a turn and stays as it is."""

    @classmethod
    def of(cls, tokens: Tokens, date: str | None = None, opening: str = "") -> OwnTemplate:
        """The template of a tokenizer, after a trial.

        Args:
            date: the day (YYYY-MM-DD) that a template which asks for the present date is told, in training and serving.
            opening: put before what the template prints, behind the begin token where the template has none.

        Raises:
            InputError: there is none, it asks for a date that is not given, or what it renders cannot be taught.
        """
        if tokens.chat_template is None:
            raise InputError("this tokenizer brings no chat template; choose one of plain, vicuna_v1, chatml, llama3")
        template = cls(tokens, _fixed_date(syntax_tree(tokens.chat_template), date))
        printed = template._render([Turn("user", "a")], add_generation_prompt=True)
        if tokens.bos and not printed.startswith(tokens.bos):
            # A processor begins every text with this token where the template does not.
            opening = tokens.bos + opening
        elif tokens.bos and opening:
            raise InputError(
                f"data.template.opening: the tokenizer's chat template begins with {tokens.bos} itself; leave it out"
            )
        if opening:
            template = cls(tokens, _printed(opening) + template.prefix)
        _ = template.stop
        return template

    @classmethod
    def of_model(cls, tokens: Tokens) -> OwnTemplate:
        """The template of a published vision-language model, after a trial. Raises InputError as `of` does."""
        if tokens.chat_template is None:
            raise InputError("this model brings no chat template; choose one of plain, vicuna_v1, chatml, llama3")
        template = cls(tokens, _fixed_date(syntax_tree(tokens.chat_template), None), is_models=True)
        printed = template._render([Turn("user", f"{IMAGE_TOKEN}a")], add_generation_prompt=True)
        if tokens.image_token not in printed:
            raise InputError("the model's chat template prints no image where a turn has one; choose another template")
        if tokens.bos and not printed.startswith(tokens.bos):
            template = cls(tokens, _printed(tokens.bos) + template.prefix, is_models=True)  # as its processor begins
        _ = template.stop
        return template

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnTemplate, (self.tokens, self.prefix, self.is_models)

    @cached_property
    def stop(self) -> str:
        """See `templates.Template`."""
        probe = self.segments([Turn("user", "a"), Turn("assistant", "b")])
        text = next(segment.text for segment in probe if segment.is_target)
        return max((token for token in self.tokens.special if text.endswith(token)), key=len)

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        """What a bundle's processor renders, by the same function."""
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": turn.role, "content": self._content(turn)} for turn in turns]
        try:
            rendered, _ = render_jinja_template(
                conversations=[messages],
                chat_template=self._whole,
                add_generation_prompt=add_generation_prompt,
                **self.tokens.variables,
            )
        except jinja2.TemplateError as error:
            raise InputError(f"the tokenizer's chat template refuses this conversation: {single_line(error)}") from None
        except Exception as error:  # a template runs expressions of its own on the sample's text
            kind = type(error).__name__
            raise InputError(f"the tokenizer's chat template ends in {kind}: {single_line(error)}") from None
        return str(rendered[0])

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """See `templates.Template`."""
        found, done = list[Segment](), ""
        for place, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt = self._render(turns[:place], add_generation_prompt=True)
            with_answer = self._render(turns[: place + 1], add_generation_prompt=False)
            if not prompt.startswith(done) or not with_answer.startswith(prompt):
                raise InputError(
                    "the tokenizer's chat template rewrites earlier turns, so prompt and answer cannot be told apart;"
                    " choose an explicit template such as chatml"
                )
            found.append(Segment(prompt[len(done) :], False))
            answer = self._up_to_end(with_answer[len(prompt) :], turn.text)
            ends = any(answer.endswith(token) for token in self.tokens.special)
            found.append(Segment(answer if ends else answer + self.tokens.eos, True))
            done = prompt + answer
        return found

    def _up_to_end(self, text: str, answer: str) -> str:
        """The answer and its end token; what the template prints after that belongs to the next prompt."""
        start = text.find(answer.strip())
        if start < 0:
            raise InputError("the tokenizer's chat template changes what the assistant says; choose another template")
        start += len(answer.strip())
        if self.is_models and not any(token in text[start:] for token in self.tokens.special):
            return text[:start]
        ends = [place + len(token) for token in self.tokens.special if (place := text.find(token, start)) >= 0]
        if not ends:
            raise InputError("the tokenizer's chat template ends no turn with a special token; choose another template")
        return text[: min(ends)]

    def jinja(self) -> str:
        """See `templates.Template`."""
        return (self.tokens.chat_template or "") if self.is_models else self._whole

    @property
    def _whole(self) -> str:
        return self.prefix + ("" if self.is_models else _FLATTEN) + (self.tokens.chat_template or "")

    def _content(self, turn: Turn) -> str | list[dict[str, str]]:
        """What the template gets of a turn. Between an image and text a line feed is the template's own affair."""
        if not self.is_models:
            return turn.text
        first, *others = turn.text.split(IMAGE_TOKEN)
        texts = [first, *(text.removeprefix("\n") for text in others)]
        if others and not texts[-1]:  # it ends with an image
            texts[-2] = texts[-2].removesuffix("\n")
        parts = list[dict[str, str]]()
        for place, text in enumerate(texts):
            parts += [{"type": "image"}] if place else []
            parts += [{"type": "text", "text": text}] if text else []
        return parts


def user_frame(tokens: Tokens) -> str:
    """What the tokenizer's own chat template prints right before a user's text, from its last special token there.

    Without a special token it is `first_token`.
    """
    before = _before_user(tokens)
    starts = [before.rfind(each) for each in tokens.special if each in before]
    return before[max(starts) :] if starts else first_token(tokens)


def first_token(tokens: Tokens) -> str:
    """The text of the first token that the tokenizer's own chat template prints before a user's text.

    Empty where there is no template, it prints nothing there, or it cannot be rendered.
    """
    before = _before_user(tokens)
    ends = (end for _, end in tokens.backend.encode(before, add_special_tokens=False).offsets if end)
    return before[: next(ends, 0)]


def _before_user(tokens: Tokens) -> str:
    if tokens.chat_template is None:
        return ""
    try:
        template = OwnTemplate(tokens, _fixed_date(syntax_tree(tokens.chat_template), _ANY_DAY))
        printed = template._render([Turn("user", _CONTENT)], add_generation_prompt=True)
    except InputError:
        return ""
    return printed.partition(_CONTENT)[0]


def _fixed_date(tree: nodes.Template, date: str | None) -> str:
    """A macro in the place of transformers' `strftime_now` that knows one day alone; empty where none is asked for."""
    if not any(node.name == _DATE for node in tree.find_all(nodes.Name)):
        return ""
    if date is None:
        raise InputError(
            "the tokenizer's chat template writes the present date, which training cannot repeat; fix it with"
            " data.template.date: YYYY-MM-DD, or choose another template"
        )
    day = datetime.date.fromisoformat(date)
    formats = {text: day.strftime(text) for text in _date_formats(tree)}
    table = ", ".join(f"{_quoted(text)}: {_quoted(shown)}" for text, shown in sorted(formats.items()))
    return "{%- macro " + _DATE + "(format) -%}{{ {" + table + "}[format] }}{%- endmacro -%}"


def _date_formats(tree: nodes.Template) -> Iterator[str]:
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == _DATE:
            if len(call.args) != 1 or not isinstance(call.args[0], nodes.Const):
                raise InputError(
                    "the tokenizer's chat template computes how it writes the date; choose another template"
                )
            yield str(call.args[0].value)


def _quoted(text: str) -> str:
    """A Jinja string constant."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _printed(text: str) -> str:
    return "{{ " + _quoted(text) + " }}"
