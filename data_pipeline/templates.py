"""Chat templates: turns -> segments of text, those to be learnt marked.

Owns the words, the mask and the Jinja twin of each template that goes into a bundle. Does not own tokenization
(`tokens`).

One segment ends exactly where the model begins to speak (the generation prompt), the next holds its answer with the
token that ends it: ids and mask grow together, turn by turn, and the same prompt is tokenized the same way in serving.
The Jinja twin takes content as a string, or as a list of {"type": "image"} and {"type": "text", "text": …}; a picture
is followed by a line feed unless it ends the turn, which is LLaVA's placing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from data_pipeline.config import ChatmlTemplate, Llama3Template, TemplateConfig
from data_pipeline.own_template import OwnTemplate
from data_pipeline.record import Turn
from data_pipeline.tokens import Segment, Tokens
from models.errors import InputError
from models.spec import IGNORE_INDEX, IMAGE_TOKEN, Config

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_CONTENT = (
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- if not loop.last -%}{{ '\\n' }}{%- endif -%}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
)
"""A turn's content, in Jinja. It loops over `message['content']` by that name, which is how vLLM sees that a template
takes lists."""


class Template(Protocol):
    """A chat template bound to a tokenizer."""

    @property
    def stop(self) -> str:
        """Text of the token that ends the assistant's turn: the `eos` of generation."""
        ...

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """The conversation as text, in order; answers with their end token are targets."""
        ...

    def jinja(self) -> str:
        """The same template for `apply_chat_template`, pictures included."""
        ...


@dataclass(frozen=True)
class Plain:
    """Pictures, then the text and a line feed; what the user says is left out, as in LLaVA's first stage."""

    tokens: Tokens

    @property
    def stop(self) -> str:
        """See `Template`."""
        return "\n"

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """See `Template`."""
        found = [Segment(self.tokens.bos, False)]
        for turn in turns:
            if turn.role == "user":
                found.append(Segment(IMAGE_TOKEN * turn.text.count(IMAGE_TOKEN), False))
            elif turn.role == "assistant":
                found.append(Segment(turn.text + self.stop, True))
        return found

    def jinja(self) -> str:
        """See `Template`."""
        pictures = (
            "{%- if message['content'] is string -%}{{ '<image>' * (message['content'].count('<image>')) }}"
            "{%- else -%}{%- for part in message['content'] -%}"
            "{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- endif -%}{%- endfor -%}{%- endif -%}"
        )
        return (
            _opening(self.tokens.bos) + "{%- for message in messages -%}"
            "{%- if message['role'] == 'user' -%}" + pictures + "{%- elif message['role'] == 'assistant' -%}"
            "" + _CONTENT + "{{ '\\n' }}{%- endif -%}{%- endfor -%}"
        )


@dataclass(frozen=True)
class Pair:
    """One picture, then what is said about it between the tokenizer's begin and end; only the end is a target."""

    tokens: Tokens

    @property
    def stop(self) -> str:
        """See `Template`."""
        return self.tokens.eos

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """See `Template`. Raises InputError unless there is exactly one picture."""
        num_pictures = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
        if num_pictures != 1:
            raise InputError(f"{num_pictures} pictures, and a pair has one picture and one text")
        text = " ".join(turn.text for turn in turns if turn.role == "assistant")
        parts = [(IMAGE_TOKEN, False), (self.tokens.bos, False), (text, False), (self.stop, True)]
        return [Segment(part, is_target) for part, is_target in parts]

    def jinja(self) -> str:
        """Nothing is generated from pairs, so there is no prompt to write."""
        raise InputError("data.template.kind: pair has no prompt; nothing can be generated in such a stage")


@dataclass(frozen=True)
class Vicuna:
    """Vicuna v1, as LLaVA-1.5 uses it: two spaces never meet, and nothing stands between an end and the next USER."""

    tokens: Tokens

    @property
    def stop(self) -> str:
        """See `Template`."""
        return self.tokens.eos

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """See `Template`."""
        system, rest = split_system(turns, VICUNA_SYSTEM)
        found, opening = list[Segment](), f"{self.tokens.bos}{system} "
        for user, assistant in zip(rest[::2], rest[1::2], strict=True):
            found.append(Segment(f"{opening}USER: {user.text} ASSISTANT:", False))
            found.append(Segment(f" {assistant.text}{self.stop}", True))
            opening = ""
        return found

    def jinja(self) -> str:
        """See `Template`."""
        return (
            _opening(self.tokens.bos)
            + "{%- if messages[0]['role'] != 'system' -%}"
            + _literal(VICUNA_SYSTEM + " ")
            + "{%- endif -%}{%- for message in messages -%}"
            "{%- if message['role'] == 'user' -%}{{ 'USER: ' }}"
            "{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' }}{%- endif -%}"
            + _CONTENT
            + "{%- if message['role'] == 'assistant' -%}"
            + _literal(self.stop)
            + "{%- else -%}{{ ' ' }}{%- endif -%}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
        )


@dataclass(frozen=True)
class Framed:
    """Templates that put every turn into the same frame of special tokens (ChatML, Llama 3)."""

    tokens: Tokens
    before_role: str
    after_role: str
    stop: str
    between: str
    """What stands between a turn's end token and the next turn."""
    system: str | None

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """See `Template`."""
        system, rest = split_system(turns, self.system)
        opening = self.tokens.bos
        if system is not None:
            opening += self._frame("system") + system + self.stop + self.between
        found = list[Segment]()
        for user, assistant in zip(rest[::2], rest[1::2], strict=True):
            question = self._frame("user") + user.text + self.stop + self.between
            found.append(Segment(opening + question + self._frame("assistant"), False))
            found.append(Segment(assistant.text + self.stop, True))
            opening = self.between
        return [*found, Segment(self.between, False)]

    def _frame(self, role: str) -> str:
        return f"{self.before_role}{role}{self.after_role}"

    def jinja(self) -> str:
        """See `Template`."""
        default = ""
        if self.system is not None:
            text = self._frame("system") + self.system + self.stop + self.between
            default = "{%- if messages[0]['role'] != 'system' -%}" + _literal(text) + "{%- endif -%}"
        return (
            _opening(self.tokens.bos)
            + default
            + "{%- for message in messages -%}"
            + _literal(self.before_role)
            + "{{ message['role'] }}"
            + _literal(self.after_role)
            + _CONTENT
            + _literal(self.stop + self.between)
            + "{%- endfor -%}{%- if add_generation_prompt -%}"
            + _literal(self._frame("assistant"))
            + "{%- endif -%}"
        )


def split_system(turns: Sequence[Turn], default: str | None) -> tuple[str | None, Sequence[Turn]]:
    """The system text (the data's own, or the default) and the turns after it."""
    if turns and turns[0].role == "system":
        return turns[0].text, turns[1:]
    return default, turns


def _literal(text: str) -> str:
    """A Jinja expression that prints `text`."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return "{{ '" + escaped + "' }}" if text else ""


def _opening(bos: str) -> str:
    return _literal(bos)


def _chatml(config: Config, tokens: Tokens) -> Template:
    assert isinstance(config, ChatmlTemplate)
    return Framed(tokens, "<|im_start|>", "\n", "<|im_end|>", "\n", config.system)


def _llama3(config: Config, tokens: Tokens) -> Template:
    assert isinstance(config, Llama3Template)
    return Framed(tokens, "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "", config.system)


_TEMPLATES: Mapping[str, Callable[[Any, Tokens], Template]] = {
    "plain": lambda _config, tokens: Plain(tokens),
    "pair": lambda _config, tokens: Pair(tokens),
    "vicuna_v1": lambda _config, tokens: Vicuna(tokens),
    "chatml": _chatml,
    "llama3": _llama3,
    "tokenizer": lambda _config, tokens: OwnTemplate(tokens),
}


def build_template(config: TemplateConfig, tokens: Tokens) -> Template:
    """Bind a template to a tokenizer.

    Raises:
        InputError: the vocabulary lacks a token that the template needs.
    """
    template = _TEMPLATES[config.kind](config, tokens)
    if isinstance(template, Framed):
        for text in (template.before_role, template.stop):
            tokens.token_id(text)
            if text not in tokens.special:
                raise InputError(f"{text!r} must be a special token of the tokenizer for the {config.kind} template")
    return template


def stop_id(template: Template, tokens: Tokens) -> int:
    """The id that ends an answer, as training teaches it."""
    _, labels = tokens.encode_segments(template.segments([Turn("user", "a"), Turn("assistant", "b")]))
    return int(labels[labels != IGNORE_INDEX][-1])
