"""Chat templates: turns -> segments of text, with the trained segments marked.

Owns the text, the mask and the equivalent Jinja template that goes into a bundle. Does not own tokenization
(`tokens`).

A segment ends exactly where the model's answer begins (the generation prompt); the next holds the answer with its end
token. So ids and mask grow together, turn by turn, and serving tokenizes the same prompt in the same way. The Jinja
template takes content as a string, or as a list of {"type": "image"} and {"type": "text", "text": …}; an image is
followed by a line feed unless it ends the turn, which is LLaVA's placing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from data_pipeline.config import ChatmlTemplate, Llama3Template, PlainTemplate, TemplateConfig
from data_pipeline.own_template import OwnTemplate, first_token, user_frame
from data_pipeline.record import Turn
from data_pipeline.tokens import Segment, Tokens
from models.common.errors import InputError
from models.spec import IGNORE_INDEX, IMAGE_TOKEN, Config

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def content_jinja(space: str) -> str:
    """A turn's content, in Jinja.

    It loops over `message['content']` by that name, by which vLLM recognises that a template takes lists.

    Args:
        space: what stands behind an image before text goes on (`Tokens.space_behind_special`).
    """
    image = f"<image>{space}"
    text = "message['content']"
    if space:
        text += f" | replace('<image>', '{image}') | replace('{image}<image>', '<image><image>')"
    return (
        "{%- if message['content'] is string -%}{{ " + text + " }}{%- else -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{ '" + image + "' }}{%- if not loop.last -%}{{ '\\n' }}{%- endif -%}"
        "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
    )


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
        """The same template for `apply_chat_template`, images included."""
        ...


@dataclass(frozen=True)
class Plain:
    """Images, then the text and a line feed; user turns are left out, as in LLaVA's first stage."""

    tokens: Tokens
    opening: str
    """What every sample begins with, the begin token included."""

    @property
    def stop(self) -> str:
        """See `Template`."""
        return "\n"

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """See `Template`."""
        space, is_behind_special = self.tokens.space_behind_special, self._opens_with_special
        found = [Segment(self.opening, False)]
        for turn in turns:
            if turn.role == "user" and (num_images := turn.text.count(IMAGE_TOKEN)):
                found.append(Segment(IMAGE_TOKEN * num_images, False))
                is_behind_special = True
            elif turn.role == "assistant":
                found.append(Segment((space if is_behind_special else "") + turn.text + self.stop, True))
                is_behind_special = False
        return found

    @property
    def _opens_with_special(self) -> bool:
        return any(self.opening.endswith(token) for token in self.tokens.special)

    def jinja(self) -> str:
        """See `Template`."""
        images = (
            "{%- if message['content'] is string -%}{{ '<image>' * (message['content'].count('<image>')) }}"
            "{%- else -%}{%- for part in message['content'] -%}"
            "{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- endif -%}{%- endfor -%}{%- endif -%}"
        )
        space = "{%- if behind.special -%}" + _literal(self.tokens.space_behind_special) + "{%- endif -%}"
        return (
            _literal(self.opening)
            + f"{{%- set behind = namespace(special={self._opens_with_special}) -%}}"
            + "{%- for message in messages -%}{%- if message['role'] == 'user' -%}{%- set found -%}"
            + images
            + "{%- endset -%}{%- if found -%}{%- set behind.special = True -%}{%- endif -%}{{ found }}"
            + "{%- elif message['role'] == 'assistant' -%}"
            + (space if self.tokens.space_behind_special else "")
            + "{%- set behind.special = False -%}"
            + content_jinja("")
            + "{{ '\\n' }}{%- endif -%}{%- endfor -%}"
        )


@dataclass(frozen=True)
class Pair:
    """One image, then its text between the tokenizer's begin and end tokens; only the end token is a target."""

    tokens: Tokens

    @property
    def stop(self) -> str:
        """See `Template`."""
        return self.tokens.eos

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """See `Template`. Raises InputError unless there is exactly one image."""
        num_images = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
        if num_images != 1:
            raise InputError(f"{num_images} images, and a pair has one image and one text")
        text = " ".join(turn.text for turn in turns if turn.role == "assistant")
        parts = [(IMAGE_TOKEN, False), (self.tokens.bos, False), (text, False), (self.stop, True)]
        return [Segment(part, is_target) for part, is_target in parts]

    def jinja(self) -> str:
        """Raises InputError: nothing is generated from pairs, so there is no prompt."""
        raise InputError("data.template.kind: pair has no prompt; nothing can be generated in such a stage")


@dataclass(frozen=True)
class Vicuna:
    """Vicuna v1, as LLaVA-1.5 uses it: no double spaces, and nothing between an end token and the next USER."""

    tokens: Tokens

    @property
    def stop(self) -> str:
        """See `Template`."""
        return self.tokens.eos

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """See `Template`."""
        system, rest = split_system(turns, VICUNA_SYSTEM)
        space = self.tokens.space_behind_special
        found, opening = list[Segment](), f"{self._begin}{system} "
        for user, assistant in zip(rest[::2], rest[1::2], strict=True):
            text = user.text.replace(IMAGE_TOKEN, IMAGE_TOKEN + space) if space else user.text
            text = text.replace(f"{IMAGE_TOKEN}{space}{IMAGE_TOKEN}", IMAGE_TOKEN * 2) if space else text
            found.append(Segment(f"{opening}USER: {text} ASSISTANT:", False))
            found.append(Segment(f" {assistant.text}{self.stop}", True))
            opening = ""
        return found

    @property
    def _begin(self) -> str:
        return self.tokens.bos + (self.tokens.space_behind_special if self.tokens.bos else "")

    def jinja(self) -> str:
        """See `Template`."""
        return (
            _literal(self._begin)
            + "{%- if messages[0]['role'] != 'system' -%}"
            + _literal(VICUNA_SYSTEM + " ")
            + "{%- endif -%}{%- for message in messages -%}"
            "{%- if message['role'] == 'user' -%}{{ 'USER: ' }}"
            "{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' }}{%- endif -%}"
            + content_jinja(self.tokens.space_behind_special)
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
    """The text between a turn's end token and the next turn."""
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
            _literal(self.tokens.bos)
            + default
            + "{%- for message in messages -%}"
            + _literal(self.before_role)
            + "{{ message['role'] }}"
            + _literal(self.after_role)
            + content_jinja("")
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


def _plain(config: Config, tokens: Tokens) -> Template:
    assert isinstance(config, PlainTemplate)
    opening = config.opening
    if not isinstance(opening, str):
        known = user_frame if opening else first_token
        opening = "" if tokens.bos else known(tokens)
    return Plain(tokens, tokens.bos + opening)


def _chatml(config: Config, tokens: Tokens) -> Template:
    assert isinstance(config, ChatmlTemplate)
    return Framed(tokens, "<|im_start|>", "\n", "<|im_end|>", "\n", config.system)


def _llama3(config: Config, tokens: Tokens) -> Template:
    assert isinstance(config, Llama3Template)
    return Framed(tokens, "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "", config.system)


_TEMPLATES: Mapping[str, Callable[[Any, Tokens], Template]] = {
    "plain": _plain,
    "pair": lambda _config, tokens: Pair(tokens),
    "vicuna_v1": lambda _config, tokens: Vicuna(tokens),
    "chatml": _chatml,
    "llama3": _llama3,
    "model": lambda _config, tokens: OwnTemplate.of_model(tokens),
    "tokenizer": lambda config, tokens: OwnTemplate.of(tokens, config.date, config.opening),
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
    """The id of the token that ends an answer in training."""
    _, labels = tokens.encode_segments(template.segments([Turn("user", "a"), Turn("assistant", "b")]))
    return int(labels[labels != IGNORE_INDEX][-1])
