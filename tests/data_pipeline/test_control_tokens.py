"""A user's text that is spelled like a control token stays text, and has the ids that a served bundle gives it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from data_pipeline.config import ChatmlTemplate, Llama3Template, TemplateConfig, TokenizerTemplate, VicunaTemplate
from data_pipeline.control_tokens import MARK_END, MARK_START, ControlTokens, split_marked
from data_pipeline.encode import Encoder
from data_pipeline.record import Record, Turn, parse_conversation
from data_pipeline.templates import build_template
from data_pipeline.tokens import Tokens
from models.common.errors import InputError
from models.spec import IGNORE_INDEX, IMAGE_TOKEN
from tests.data_pipeline.test_templates import llama3_like, modern_vicuna_tokenizer, qwen_tokenizer, vicuna_tokenizer
from tests.support.paths import data, needs_data
from tests.support.shards import IMAGE, image_bytes, tiny_tokenizer

LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    Turn("system", "Say </s> never."),
    Turn("user", f"{IMAGE_TOKEN}\n{IMAGE_TOKEN}\n</s>What does <|im_end|> do? And <s>, </s>?"),
    Turn("assistant", "It <|im_end|> ends</s> a turn: <|eot_id|>"),
    Turn("user", "<|im_end|>"),
    Turn("assistant", "</s> and <|im_start|>system"),
)


def llama2_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = vicuna_tokenizer()
    tokenizer.chat_template = LLAMA2_TEMPLATE
    return tokenizer


@needs_data
def test_llama_2s_own_template_equals_llavas_preprocessing_row_by_row() -> None:
    """LLaVA's `llava_llama_2` conversation, its system text given as a turn: ids and labels of its own code."""
    samples = {row["id"]: row for row in json.loads(data("instruct", "llava_format_samples.json").read_text())}
    lines = data("instruct", "llava_preprocess_reference.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["version"] == "llava_llama_2"]
    tokenizer = llama2_tokenizer()
    tokens = Tokens.of(tokenizer)
    template = build_template(TokenizerTemplate(), tokens)
    for row in rows:
        text = tokenizer.decode([token for token in row["input_ids"] if token >= 0])
        system = text.partition("<<SYS>>\n")[2].partition("\n<</SYS>>")[0]
        turns = (Turn("system", system), *parse_conversation(samples[row["id"]]["conversations"]))
        ids, labels = tokens.encode_segments(template.segments(turns))
        assert np.where(ids == tokens.image_token_id, -200, ids).tolist() == row["input_ids"], row["id"]
        assert labels.tolist() == row["labels"], row["id"]
    assert len(rows) > 20


def hidden_specials() -> PreTrainedTokenizerFast:
    """Control tokens that are special, and in none of the tokenizer's named lists, as Llama 3 has them."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in HEADERS])
    return tokenizer


HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CASES = [
    pytest.param(VicunaTemplate(), vicuna_tokenizer, marks=needs_data, id="vicuna"),
    pytest.param(VicunaTemplate(), modern_vicuna_tokenizer, marks=needs_data, id="vicuna-not-legacy"),
    pytest.param(VicunaTemplate(), qwen_tokenizer, marks=needs_data, id="vicuna-qwen"),
    pytest.param(ChatmlTemplate(), qwen_tokenizer, marks=needs_data, id="chatml-qwen"),
    pytest.param(TokenizerTemplate(), qwen_tokenizer, marks=needs_data, id="own-qwen"),
    pytest.param(TokenizerTemplate(), llama2_tokenizer, marks=needs_data, id="own-llama2"),
    pytest.param(ChatmlTemplate(), tiny_tokenizer, id="chatml-bytes"),
    pytest.param(Llama3Template(), llama3_like, id="llama3-bytes"),
    pytest.param(Llama3Template(), hidden_specials, id="llama3-hidden"),
]


def encoder(config: TemplateConfig, tokenizer: Any, kept: tuple[str, ...] = ()) -> Encoder:
    tokens = Tokens.of(tokenizer)
    return Encoder([], build_template(config, tokens), tokens, IMAGE, 2**20, kept_control_tokens=kept)


def trained(config: TemplateConfig, tokenizer: Any, turns: tuple[Turn, ...]) -> tuple[list[int], list[int]]:
    images = tuple(image_bytes(n) for n in range(sum(turn.text.count(IMAGE_TOKEN) for turn in turns)))
    encoding = encoder(config, tokenizer).encode_record(Record(images, turns))
    return encoding.input_ids.tolist(), encoding.labels.tolist()


def served(config: TemplateConfig, tokenizer: Any, turns: tuple[Turn, ...], *, asks: bool) -> list[int]:
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=build_template(config, Tokens.of(tokenizer)).jinja(),
    )
    messages = []
    for turn in turns:
        *images, text = turn.text.split(f"{IMAGE_TOKEN}\n")
        content: list[dict[str, Any]] = [{"type": "image", "image": Image.new("RGB", (16, 16))} for _ in images]
        messages.append({"role": turn.role, "content": [*content, {"type": "text", "text": text}]})
    found = processor.apply_chat_template(
        messages, add_generation_prompt=asks, tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    return [int(token) for token in np.asarray(found["input_ids"]).ravel()]


@pytest.mark.parametrize("turns", [TURNS, TURNS[1:], TURNS[1:3]], ids=["system", "two", "one"])
@pytest.mark.parametrize(("config", "make_tokenizer"), CASES)
def test_ids_of_training_are_ids_of_serving(config: TemplateConfig, make_tokenizer: Any, turns: Any) -> None:
    tokenizer = make_tokenizer()
    ids, labels = trained(config, tokenizer, turns)
    chat = served(config, tokenizer, turns, asks=False)
    assert chat[: len(ids)] == ids[: len(chat)]
    assert abs(len(chat) - len(ids)) <= 1  # a space or a line feed behind the last end is taught by none
    prompt = served(config, tokenizer, turns[:-1], asks=True)
    assert ids[: len(prompt)] == prompt
    learnt = [token for token in labels[len(prompt) :] if token != IGNORE_INDEX]
    assert learnt == ids[len(prompt) : len(prompt) + len(learnt)]


@pytest.mark.parametrize(("config", "make_tokenizer"), CASES)
def test_an_answer_teaches_its_end_once(config: TemplateConfig, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    _, labels = trained(config, tokenizer, TURNS[1:])
    ends = {tokenizer.convert_tokens_to_ids(name) for name in ("</s>", "<|im_end|>", "<|eot_id|>")}
    assert sum(label in ends for label in labels) == 2


def test_a_recipe_may_let_answers_write_a_control_token() -> None:
    tokenizer = tiny_tokenizer()
    turns = (Turn("user", "<|im_start|>"), Turn("assistant", "a<|im_start|>b"))
    kept = encoder(ChatmlTemplate(), tokenizer, kept=("<|im_start|>",))
    ids = kept.encode_record(Record((), turns)).input_ids.tolist()
    assert (
        ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    )  # two frames and the answer's, not the user's
    with pytest.raises(InputError, match=r"'<\|im_strat\|>' is no control token.*<\|im_start\|>"):
        kept.control_tokens.without(["<|im_strat|>"])


def test_an_added_token_that_is_not_special_is_one_where_the_template_writes_it() -> None:
    added = ["<think>", "<tool>", "\n"]
    found = ControlTokens.of(["</s>", IMAGE_TOKEN], added, "{{ '<think>\n' }}{% generation %}a{% endgeneration %}")
    assert found.names == {"</s>", "<think>"}


def test_marks_in_the_data_change_nothing() -> None:
    control = ControlTokens(frozenset({"</s>"}))
    text = f"{MARK_START}</s>{MARK_END}a{MARK_END}"
    assert control.mark(text) == f"{MARK_START}</s>{MARK_END}a"
    assert split_marked(control.mark(text)) == ["", "</s>", "a"]
