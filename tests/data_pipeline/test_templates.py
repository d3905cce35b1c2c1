"""Ids and masks equal LLaVA's own, and prompts equal what a served bundle makes of the same messages."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from data_pipeline.config import (
    ChatmlTemplate,
    Llama3Template,
    PlainTemplate,
    TemplateConfig,
    TokenizerTemplate,
    VicunaTemplate,
)
from data_pipeline.record import Turn, caption_turns, parse_conversation
from data_pipeline.templates import build_template, stop_id
from data_pipeline.tokens import Tokens
from models.common.errors import InputError
from models.spec import IGNORE_INDEX, IMAGE_TOKEN
from tests.support.paths import data, needs_data
from tests.support.shards import tiny_tokenizer
from tests.support.tokenizers import (
    bare_tokenizer,
    llama3_like,
    modern_vicuna_tokenizer,
    qwen_tokenizer,
    talking_tokenizer,
    vicuna_tokenizer,
)

CHAT = (
    Turn("user", f"{IMAGE_TOKEN}\nWhat is this?"),
    Turn("assistant", "A cat."),
    Turn("user", "Are you sure?\nReally?"),
    Turn("assistant", "\nYes."),
)


def encode(config: TemplateConfig, tokenizer: Any, turns: tuple[Turn, ...]) -> tuple[Any, Any]:
    tokens = Tokens.of(tokenizer)
    return tokens.encode_segments(build_template(config, tokens).segments(turns))


@needs_data
@pytest.mark.parametrize(("version", "config"), [("v1", VicunaTemplate()), ("plain", PlainTemplate())])
def test_equals_llavas_own_preprocessing_row_by_row(version: str, config: TemplateConfig) -> None:
    samples = {row["id"]: row for row in json.loads(data("instruct", "llava_format_samples.json").read_text())}
    lines = data("instruct", "llava_preprocess_reference.jsonl").read_text().splitlines()
    tokens = Tokens.of(vicuna_tokenizer())
    template = build_template(config, tokens)
    rows = [row for row in map(json.loads, lines) if row["version"] == version]
    for row in rows:
        turns = parse_conversation(samples[row["id"]]["conversations"])
        if version == "plain":
            turns = caption_turns(turns[1].text, "", 1)  # the reference took the first answer as the caption
        ids, labels = tokens.encode_segments(template.segments(turns))
        ids = np.where(ids == tokens.image_token_id, -200, ids)
        assert ids.tolist() == row["input_ids"], row["id"]
        assert labels.tolist() == row["labels"], row["id"]
    assert len(rows) > 20


@needs_data
@pytest.mark.parametrize("config", [VicunaTemplate(), PlainTemplate()])
def test_without_legacy_ids_equal_llavas_tokenization_between_images(config: TemplateConfig) -> None:
    """LLaVA (mm_utils.tokenizer_image_token) tokenizes each text between images as a text of its own.

    The 203 rows that its code makes of these samples with transformers 4.37.2 and legacy=False were compared once: all
    ids and labels were equal.
    """
    tokenizer = modern_vicuna_tokenizer()
    tokens = Tokens.of(tokenizer)
    template = build_template(config, tokens)
    for sample in json.loads(data("instruct", "llava_format_samples.json").read_text())[:60]:
        turns = parse_conversation(sample["conversations"])
        text = "".join(
            segment.text for segment in build_template(config, Tokens.of(vicuna_tokenizer())).segments(turns)
        )
        pieces = text.removeprefix("<s>").split(IMAGE_TOKEN)
        expected = [tokenizer.bos_token_id]
        for place, piece in enumerate(pieces):
            expected += [tokens.image_token_id] * (place > 0)
            expected += tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids, labels = tokens.encode_segments(template.segments(turns))
        assert ids.tolist() == expected
        assert set(labels[labels != ids].tolist()) <= {IGNORE_INDEX}
        answers = "".join(turn.text + template.stop for turn in turns if turn.role == "assistant")
        learnt = tokenizer.decode(labels[labels != IGNORE_INDEX], clean_up_tokenization_spaces=False)
        assert "".join(learnt.split()) == "".join(answers.split())


def messages(turns: tuple[Turn, ...], *, as_list: bool) -> list[dict[str, Any]]:
    """The turns as a person would write them for `apply_chat_template`."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        content: Any = turn.text
        if as_list:
            images, text = turn.text.count(IMAGE_TOKEN), turn.text.replace(f"{IMAGE_TOKEN}\n", "")
            content = [{"type": "image", "image": Image.new("RGB", (16, 16))}] * images
            content = [*content, {"type": "text", "text": text}]
        found.append({"role": turn.role, "content": content})
    return found


def cases() -> list[Any]:
    return [
        pytest.param(VicunaTemplate(), vicuna_tokenizer, marks=needs_data, id="vicuna-sentencepiece"),
        pytest.param(VicunaTemplate(), modern_vicuna_tokenizer, marks=needs_data, id="vicuna-not-legacy"),
        pytest.param(PlainTemplate(), modern_vicuna_tokenizer, marks=needs_data, id="plain-not-legacy"),
        pytest.param(VicunaTemplate(), qwen_tokenizer, marks=needs_data, id="vicuna-qwen"),
        pytest.param(ChatmlTemplate(), qwen_tokenizer, marks=needs_data, id="chatml-qwen"),
        pytest.param(ChatmlTemplate(system="It's \\ short."), qwen_tokenizer, marks=needs_data, id="chatml-system"),
        pytest.param(TokenizerTemplate(), qwen_tokenizer, marks=needs_data, id="own-qwen"),
        pytest.param(PlainTemplate(), vicuna_tokenizer, marks=needs_data, id="plain-sentencepiece"),
        pytest.param(ChatmlTemplate(), tiny_tokenizer, id="chatml-bytes"),
        pytest.param(VicunaTemplate(), tiny_tokenizer, id="vicuna-bytes"),
        pytest.param(PlainTemplate(), tiny_tokenizer, id="plain-bytes"),
        pytest.param(PlainTemplate(), talking_tokenizer, id="plain-opens-as-the-chat"),
        pytest.param(PlainTemplate(opening="\n"), talking_tokenizer, id="plain-line-feed"),
        pytest.param(PlainTemplate(opening=""), talking_tokenizer, id="plain-image-first"),
        pytest.param(PlainTemplate(opening="It's a "), vicuna_tokenizer, marks=needs_data, id="plain-behind-bos"),
        pytest.param(
            PlainTemplate(opening="A"), modern_vicuna_tokenizer, marks=needs_data, id="plain-behind-bos-not-legacy"
        ),
        pytest.param(TokenizerTemplate(opening="\n"), bare_tokenizer, id="own-bare"),
        pytest.param(Llama3Template(system="Be brief."), llama3_like, id="llama3-bytes"),
    ]


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "string"])
@pytest.mark.parametrize(
    ("config", "make_tokenizer"),
    [*cases(), pytest.param(PlainTemplate(), qwen_tokenizer, marks=needs_data, id="plain-qwen")],
)
def test_the_processor_makes_the_prompt_ids_of_training(
    config: TemplateConfig, make_tokenizer: Any, as_list: bool
) -> None:
    tokenizer = make_tokenizer()
    ids, labels = encode(config, tokenizer, CHAT[:2])
    prompt = ids[: int(np.argmax(labels != IGNORE_INDEX))].tolist()
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        chat_template=build_template(config, Tokens.of(tokenizer)).jinja(),
    )
    images = {} if as_list else {"processor_kwargs": {"images": [Image.new("RGB", (16, 16))]}}
    served = processor.apply_chat_template(
        messages(CHAT[:1], as_list=as_list), add_generation_prompt=True, tokenize=True, return_dict=True, **images
    )
    assert np.asarray(served["input_ids"]).ravel().tolist() == prompt


@pytest.mark.parametrize(("config", "make_tokenizer"), cases())
def test_jinja_renders_the_text_of_training(config: TemplateConfig, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    template = build_template(config, Tokens.of(tokenizer))
    if config.kind == "tokenizer":
        turns: tuple[Turn, ...] = CHAT
    else:
        turns = (Turn("system", "One system."), *CHAT) if config.kind != "plain" else CHAT
    text = "".join(segment.text for segment in template.segments(turns))
    rendered = tokenizer.apply_chat_template(
        messages(turns, as_list=True), chat_template=template.jinja(), tokenize=False, add_generation_prompt=False
    )
    assert rendered.rstrip("\n") == text.rstrip("\n")


@pytest.mark.parametrize(("config", "make_tokenizer"), cases())
def test_targets_are_the_answers_and_their_end(config: TemplateConfig, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    tokens = Tokens.of(tokenizer)
    template = build_template(config, tokens)
    _, labels = tokens.encode_segments(template.segments(CHAT))
    learnt = tokenizer.decode(labels[labels != IGNORE_INDEX])
    assert "A cat." in learnt
    assert "Yes." in learnt
    assert "sure" not in learnt
    assert "USER" not in learnt
    assert int(np.count_nonzero(labels == stop_id(template, tokens))) == (3 if config.kind == "plain" else 2)


def test_the_end_token_is_learnt_where_padding_is_the_same_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    _, labels = encode(ChatmlTemplate(), tokenizer, CHAT)
    assert int(np.count_nonzero(labels == tokenizer.eos_token_id)) == 2


def test_chatml_has_no_system_turn_unless_given() -> None:
    tokens = Tokens.of(tiny_tokenizer())
    text = "".join(part.text for part in build_template(ChatmlTemplate(), tokens).segments(CHAT))
    assert "system" not in text


def test_a_vocabulary_without_the_frame_is_refused() -> None:
    with pytest.raises(InputError, match="start_header_id"):
        build_template(Llama3Template(), Tokens.of(tiny_tokenizer()))


@needs_data
@pytest.mark.parametrize("make_tokenizer", [vicuna_tokenizer, qwen_tokenizer])
def test_segments_encode_as_the_whole_text(make_tokenizer: Any) -> None:
    """Where no answer starts with a line feed, cutting into segments changes no id."""
    tokenizer = make_tokenizer()
    samples = json.loads(data("instruct", "llava_format_samples.json").read_text())
    tokens = Tokens.of(tokenizer)
    template = build_template(VicunaTemplate(), tokens)
    for sample in samples[:60]:
        segments = template.segments(parse_conversation(sample["conversations"]))
        ids, _ = tokens.encode_segments(segments)
        whole = tokenizer("".join(segment.text for segment in segments), add_special_tokens=False)["input_ids"]
        assert ids.tolist() == whole
