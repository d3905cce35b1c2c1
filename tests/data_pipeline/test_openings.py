"""What stands before the image of a chat's first turn."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors

from data_pipeline.config import PlainTemplate, TemplateConfig, TokenizerTemplate
from data_pipeline.own_template import first_token, user_frame
from data_pipeline.record import Turn
from data_pipeline.templates import build_template
from data_pipeline.tokens import Tokens
from models.common.errors import InputError
from models.spec import IMAGE_TOKEN
from tests.support.shards import tiny_tokenizer
from tests.support.tokenizers import bare_tokenizer, talking_tokenizer

CHAT = (Turn("user", f"{IMAGE_TOKEN}\nWhat is this?"), Turn("assistant", "A cat."))


def first_ids(config: TemplateConfig, tokenizer: Any) -> list[int]:
    """The ids before the image."""
    tokens = Tokens.of(tokenizer)
    ids, _ = tokens.encode_segments(build_template(config, tokens).segments(CHAT))
    return [int(token) for token in ids[: ids.tolist().index(tokens.image_token_id)]]


def test_plain_opens_with_what_the_model_knows_to_come_first() -> None:
    tokenizer = talking_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert first_ids(PlainTemplate(), tokenizer) == tokenizer.encode("<|im_start|>user\n")
    assert first_ids(PlainTemplate(opening=None), tokenizer) == [start]
    assert first_ids(PlainTemplate(opening="\n"), tokenizer) == tokenizer.encode("\n")
    assert first_ids(PlainTemplate(opening=""), tokenizer) == []
    assert first_ids(PlainTemplate(), tiny_tokenizer()) == []  # no chat template says what comes first


def test_the_begin_token_is_the_opening_where_a_tokenizer_adds_one() -> None:
    tokenizer = talking_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))]
    )
    tokenizer.bos_token = "<|endoftext|>"
    begin = tokenizer.bos_token_id
    assert first_ids(PlainTemplate(), tokenizer) == [begin]
    assert first_ids(PlainTemplate(opening="<|im_start|>"), tokenizer) == [begin, begin + 1]


@pytest.mark.parametrize(
    ("chat_template", "opening"),
    [
        ("{{ 'User: ' + messages[0]['content'] }}", "U"),  # a vocabulary in which that is a token
        ("{{ messages[0]['content'] }}", ""),
        ("{% if messages[0]['role'] == 'user' %}{{ raise_exception('no') }}{% endif %}", ""),
        ("{% if %}", ""),
        ("{{ strftime_now('%d %b %Y') }}{{ messages[0]['content'] }}", "0"),
    ],
)
def test_the_opening_is_the_first_token_before_what_a_user_says(chat_template: str, opening: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    assert first_token(Tokens.of(tokenizer)) == opening


@pytest.mark.parametrize(
    ("chat_template", "frame"),
    [
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{{ messages[0]['content'] }}",
            "<|im_start|>user\n",
        ),
        ("Be brief.<|im_end|>{{ messages[0]['content'] }}", "<|im_end|>"),
        ("{{ 'User: ' + messages[0]['content'] }}", "U"),
        ("{{ messages[0]['content'] }}<|im_end|>", ""),
    ],
)
def test_the_frame_is_what_stands_right_before_what_a_user_says(chat_template: str, frame: str) -> None:
    tokenizer = talking_tokenizer()
    tokenizer.chat_template = chat_template
    assert user_frame(Tokens.of(tokenizer)) == frame


def test_what_a_user_says_first_can_be_given_an_opening_in_an_own_template() -> None:
    tokenizer = bare_tokenizer()
    assert first_ids(TokenizerTemplate(), tokenizer) == []
    assert first_ids(TokenizerTemplate(opening="\n"), tokenizer) == tokenizer.encode("\n")


def test_an_opening_before_a_begin_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))]
    )
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + (bare_tokenizer().chat_template or "")
    with pytest.raises(InputError, match=r"data\.template\.opening: .*begins with <\|endoftext\|> itself"):
        build_template(TokenizerTemplate(opening="\n"), Tokens.of(tokenizer))
