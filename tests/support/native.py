"""Tiny random models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL of transformers' own classes, with their processors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from tests.support.bundles import make_tokenizer
from tests.support.paths import data

NATIVE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PATCH, MERGE = 4, 2
SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen2.5-VL's own, without videos."""

_CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
CLASSES = {family: f"{name}ForConditionalGeneration" for family, name in _CLASSES.items()}


def real_tokenizer() -> Any:
    """Qwen2's own vocabulary, with the control tokens of its vision-language models; only under `needs_data`."""
    from transformers import AddedToken, Qwen2TokenizerFast

    place = data("tokenizers", "qwen2")
    tokenizer = Qwen2TokenizerFast(
        vocab=json.loads((place / "vocab.json").read_text()),
        merges=[
            tuple(line.split(" ", 1))
            for line in (place / "merges.txt").read_text().splitlines()
            if line and not line.startswith("#version")
        ],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def stock_content(question: str, images: Sequence[Any]) -> list[dict[str, Any]]:
    """A question of ours as the parts of a message: images at their tags, which no line feed follows."""
    parts: list[dict[str, Any]] = []
    for place, text in enumerate(question.split("<image>")):
        parts += [{"type": "image", "image": images[place - 1]}] if place else []
        shown = text.removeprefix("\n") if place else text
        parts += [{"type": "text", "text": shown}] if shown else []
    return parts


def native_processor(family: str, tokenizer: Any = None) -> Any:
    """A family's processor for images of 4 to 64 tokens of 8 x 8 pixels."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    import models.native.processors as processors

    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        size={"shortest_edge": 4 * (PATCH * MERGE) ** 2, "longest_edge": 64 * (PATCH * MERGE) ** 2},
    )
    processor_class = getattr(processors, f"{_CLASSES[family]}ImagesProcessor")
    return processor_class(
        image_processor=images, tokenizer=tokenizer or make_tokenizer(SPECIALS), chat_template=TEMPLATE
    )


def native_model(family: str, tokenizer: Any, *, tied: bool = False, width: int = 48) -> Any:
    """A random model of a family: 4 blocks of which two attend in windows, or two levels are added later.

    `width` is the language model's, a multiple of 16.
    """
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 64}
    tower: dict[str, Any] = {**shape, "depth": 4, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": MERGE}
    tower |= {"out_hidden_size": width}
    if family == "qwen2_vl":
        tower = {**tower, "embed_dim": 32, "hidden_size": width, "mlp_ratio": 2}
        del tower["intermediate_size"], tower["out_hidden_size"]
    elif family == "qwen2_5_vl":
        tower |= {"window_size": 2 * PATCH * MERGE, "fullatt_block_indexes": [1, 3]}
    else:
        tower |= {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]}
    text: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": width // 16,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": len(tokenizer) + 4,  # padded, as hub models are
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1000.0},
    }
    if family != "qwen3_vl":
        del text["head_dim"]
    ids = {
        f"{name}_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image_token", "<|image_pad|>"),
            ("video_token", "<|video_pad|>"),
            ("vision_start_token", "<|vision_start|>"),
            ("vision_end_token", "<|vision_end|>"),
        )
    }
    config_class = getattr(transformers, f"{_CLASSES[family]}Config")
    config = config_class(vision_config=tower, text_config=text, tie_word_embeddings=tied, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        for name, weight in model.model.visual.named_parameters():  # bold, so that an image matters
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3 if "merger" in name else 0.15)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model.eval()
