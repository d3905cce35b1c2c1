"""The chat template that a tokenizer brings along, turned into segments.

Owns rendering it the way transformers does, and finding in its output where the assistant speaks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_pipeline.record import Turn
from data_pipeline.tokens import Segment, Tokens
from models.errors import InputError

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
"""Content lists to strings: a text model's template knows nothing of pictures."""


@dataclass(frozen=True)
class OwnTemplate:
    """See `templates.Template`.

    Raises:
        InputError: the tokenizer has no chat template, or one in which a later turn changes the text of an earlier one.
    """

    tokens: Tokens

    def __post_init__(self) -> None:
        if self.tokens.chat_template is None:
            raise InputError("this tokenizer brings no chat template; choose one of plain, vicuna_v1, chatml, llama3")

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnTemplate, (self.tokens,)

    @cached_property
    def stop(self) -> str:
        """See `templates.Template`."""
        probe = self.segments([Turn("user", "a"), Turn("assistant", "b")])
        return next(segment.text for segment in probe if segment.is_target)[1:]

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False, **kwargs)
        return environment.from_string(self.tokens.chat_template or "")

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            return self._compiled.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.tokens.bos,
                eos_token=self.tokens.eos,
            )
        except jinja2.TemplateError as error:
            raise InputError(f"the tokenizer's chat template refuses this conversation: {error}") from None

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
            found.append(Segment(answer, True))
            done = prompt + answer
        return found

    def _up_to_end(self, text: str, answer: str) -> str:
        """The answer and its end token; what the template prints after that belongs to the next prompt."""
        start = text.find(answer.strip()) + len(answer.strip())
        ends = [place + len(token) for token in self.tokens.special if (place := text.find(token, start)) >= 0]
        if not ends:
            raise InputError("the tokenizer's chat template ends no turn with a special token; choose another template")
        return text[: min(ends)]

    def jinja(self) -> str:
        """See `templates.Template`."""
        return _FLATTEN + (self.tokens.chat_template or "")


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
