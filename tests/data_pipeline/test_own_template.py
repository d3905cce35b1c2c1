"""A tokenizer's own chat template: prompts as transformers renders them, targets where the assistant speaks."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from data_pipeline.own_template import OwnTemplate
from data_pipeline.record import Turn
from data_pipeline.tokens import Tokens
from models.common.errors import InputError
from models.spec import IMAGE_TOKEN
from tests.support.shards import tiny_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = (Turn("user", "One?"), Turn("assistant", "1"), Turn("user", "Two?"), Turn("assistant", "2"))


def template(jinja: str | None = CHATML) -> tuple[OwnTemplate, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = jinja
    return OwnTemplate.of(Tokens.of(tokenizer)), tokenizer


def messages(turns: tuple[Turn, ...]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def test_targets_are_the_answers_and_their_end() -> None:
    own, _ = template()
    assert [segment.text for segment in own.segments(CHAT) if segment.is_target] == ["1<|im_end|>", "2<|im_end|>"]
    assert own.stop == "<|im_end|>"


def test_what_is_seen_before_an_answer_is_transformers_prompt() -> None:
    own, tokenizer = template()
    segments = own.segments(CHAT)
    for num_turns, num_segments in ((1, 1), (3, 3)):
        seen = "".join(segment.text for segment in segments[:num_segments])
        asked = tokenizer.apply_chat_template(messages(CHAT[:num_turns]), tokenize=False, add_generation_prompt=True)
        assert seen == asked


def test_the_jinja_of_a_bundle_takes_content_as_a_list() -> None:
    own, tokenizer = template()
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]}]
    found = tokenizer.apply_chat_template(parts, chat_template=own.jinja(), tokenize=False)
    whole = [{"role": "user", "content": f"{IMAGE_TOKEN}\nOne?"}]
    assert found == tokenizer.apply_chat_template(whole, chat_template=own.jinja(), tokenize=False)
    assert found == tokenizer.apply_chat_template(whole, tokenize=False)


def test_it_pickles_after_it_was_used() -> None:
    """Compiled Jinja does not pickle, and a worker gets the template after the main process asked it for `stop`."""
    own, _ = template()
    assert own.stop
    assert pickle.loads(pickle.dumps(own)).segments(CHAT) == own.segments(CHAT)


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        (CHATML.replace("messages %}", "messages[-2:] %}"), "rewrites earlier turns"),
        (CHATML.replace("<|im_end|>", ""), "ends no turn with a special token"),
        ("{{ raise_exception('only one turn') }}", "refuses this conversation: only one turn"),
    ],
)
def test_templates_that_cannot_be_taught(jinja: str, reason: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = jinja
    with pytest.raises(InputError, match=reason):
        OwnTemplate(Tokens.of(tokenizer)).segments(CHAT)


@pytest.mark.parametrize(
    "write", ["{{ strftime_now('%d %b %Y') }}", "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"]
)
def test_a_date_is_fixed_by_the_recipe_in_training_and_in_the_bundle(write: str) -> None:
    with pytest.raises(InputError, match=r"data\.template\.date"):
        template(write + CHATML)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = write + CHATML
    own = OwnTemplate.of(Tokens.of(tokenizer), "2024-07-26")
    prompt = own.segments(CHAT)[0].text
    assert prompt.startswith(("26 Jul 2024<|im_start|>", "2024<|im_start|>"))
    asked = messages(CHAT[:1])
    assert prompt == tokenizer.apply_chat_template(
        asked, chat_template=own.jinja(), tokenize=False, add_generation_prompt=True
    )


def test_a_template_may_use_what_transformers_gives_it() -> None:
    """Variables, the tag `generation`, `dict`, `tojson` with its options, `namespace`, `break`."""
    rich = (
        "{{ bos_token }}{% if tools is none and documents is none %}{% set seen = namespace(n=0) %}"
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
        "{% set seen.n = seen.n + 1 %}{% if seen.n > 8 %}{% break %}{% endif %}{% endfor %}{% endif %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
    tokenizer.chat_template = rich
    own = OwnTemplate.of(Tokens.of(tokenizer))
    prompt = own.segments(CHAT)[0].text
    assert prompt == tokenizer.apply_chat_template(messages(CHAT[:1]), tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<|endoftext|><|im_start|>user\nOne?")


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(InputError, match="brings no chat template"):
        template(None)


LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As LLaVA-1.5's processor has it: images first, and no end token."""


def of_model(jinja: str) -> tuple[OwnTemplate, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = jinja
    return OwnTemplate.of_model(Tokens.of(tokenizer)), tokenizer


def test_a_published_template_gets_images_as_parts_and_goes_on_as_it_is() -> None:
    own, tokenizer = of_model(LLAVA)
    assert own.jinja() == LLAVA
    turns = (Turn("user", f"{IMAGE_TOKEN}\nOne?"), Turn("assistant", "1"))
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]}]
    asked = tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
    assert own.segments(turns)[0].text == asked == "USER: <image>\nOne? ASSISTANT:"


def test_an_answer_without_an_end_token_gets_the_tokenizers() -> None:
    own, _ = of_model(LLAVA)
    texts = [segment.text for segment in own.segments(CHAT)]
    assert texts == ["USER: One? ASSISTANT:", " 1<|im_end|>", " USER: Two? ASSISTANT:", " 2<|im_end|>"]
    assert own.stop == "<|im_end|>"
    assert pickle.loads(pickle.dumps(own)).segments(CHAT) == own.segments(CHAT)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<image>\nWhat?", ["image", "What?"]),
        ("<image>What?", ["image", "What?"]),
        ("What?\n<image>", ["What?", "image"]),
        ("<image>\n<image>\nBoth?", ["image", "image", "Both?"]),
        ("See <image>\n\nhere", ["See ", "image", "\nhere"]),
        ("a\n<image>\nb", ["a\n", "image", "b"]),
        ("<image>", ["image"]),
        ("none", ["none"]),
    ],
)
def test_a_turn_is_cut_at_its_images(text: str, parts: list[str]) -> None:
    own, _ = of_model(LLAVA)
    found = own._content(Turn("user", text))
    assert [part if isinstance(part, str) else part.get("text", part["type"]) for part in found] == parts


def test_a_template_that_shows_no_image_is_refused() -> None:
    with pytest.raises(InputError, match="prints no image"):
        of_model(CHATML.replace("message['content']", "message['role']"))
