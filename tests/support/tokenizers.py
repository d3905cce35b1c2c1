"""Tokenizers of the kinds that templates meet: with and without a begin token, a chat template, a frame of tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models.spec import IMAGE_TOKEN
from tests.support.paths import data
from tests.support.shards import tiny_tokenizer


def vicuna_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(data("tokenizers", "vicuna_fast", "vicuna_tokenizer.json")),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    return with_image(tokenizer)


def modern_vicuna_tokenizer() -> PreTrainedTokenizerFast:
    """The same vocabulary as transformers opens it with `legacy: false`: a space before the whole text only."""
    backend = Tokenizer.from_file(str(data("tokenizers", "vicuna_fast", "vicuna_tokenizer.json")))
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return with_image(PreTrainedTokenizerFast(tokenizer_object=backend, **names))


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    return with_image(AutoTokenizer.from_pretrained(data("tokenizers", "qwen2")))


def llama3_like() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, *names]})
    return tokenizer


def talking_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML as its own template, and no begin token: SmolLM2's kind."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """Its own template prints what was said and nothing before it, so an image stands first."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    return tokenizer


def with_image(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer
