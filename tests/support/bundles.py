"""Tiny random bundles for tests: the directory layout of a real one, made of stock transformers classes alone.

Random weights write nonsense, but deterministic nonsense that depends on the image, which is what equivalence tests
need. Nothing here imports the code that makes real bundles, so that readers of bundles are tested apart from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
SENTENCES = (
    "What is in the picture? How many shapes are there? Which colour is the one on the left?",
    "A red circle, a large blue square and two small green triangles above the yellow star.",
    "user assistant system picture question answer yes no one two three four",
)
TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
IMAGE_SIZE, PATCH_SIZE = 48, 12


def make_bundle(
    folder: Path,
    *,
    tied: bool = True,
    manifest: bool = True,
    seed: int = 0,
    num_positions: int = 512,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random Llava bundle (16 tokens an image) into `folder`, with its sightline.json unless refused."""
    processor = make_processor()
    model = _model(processor.tokenizer, tied=tied, seed=seed, num_positions=num_positions)
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    if manifest:
        write_manifest(folder)
    return folder


def write_manifest(folder: Path) -> None:
    """Write sightline.json over whatever files lie in `folder` now."""
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "sightline.json"
    }
    checks = [
        {"name": "prompt ids differ", "value": 0.0, "bound": 0.0, "passed": True},
        {"name": "largest pixel difference", "value": 2.4e-07, "bound": 1e-05, "passed": True},
        {"name": "largest relative logit difference", "value": 2.1e-06, "bound": 1e-4, "passed": True},
        {"name": "share of same choices", "value": 1.0, "bound": 1.0, "passed": True},
    ]
    manifest: dict[str, Any] = {
        "format": "sightline-bundle",
        "version": 1,
        "recipe": {"name": "tiny_random", "stage": "lora"},
        "precision": "fp32",
        "parents": {},
        "files": files,
        "parity": {"reference": "the trained model", "num_prompts": 8, "checks": checks},
    }
    (folder / "sightline.json").write_text(json.dumps(manifest, indent=2))


def image(kind: str = "circle", size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A drawn image: a red circle or a blue square on white, so that two images differ plainly."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    box = (size[0] // 5, size[1] // 5, size[0] * 4 // 5, size[1] * 4 // 5)
    if kind == "circle":
        draw.ellipse(box, fill="red")
    else:
        draw.rectangle(box, fill="blue")
    return image


def make_tokenizer(specials: Sequence[str] = SPECIALS) -> Any:
    """A byte-level tokenizer with ChatML's frame; the first special token pads, the third ends a turn."""
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=list(specials),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    pad, start, end, *others = specials
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=end,
        pad_token=pad,
        additional_special_tokens=[start, *others],
        clean_up_tokenization_spaces=False,
    )


def make_processor() -> Any:
    """LLaVA's, over a byte-level tokenizer with ChatML's frame."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=make_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def _model(tokenizer: Any, *, tied: bool, seed: int, num_positions: int) -> Any:
    from transformers import (
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=num_positions,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # wide, so that random answers depend on the image
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=1.0)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=128
    )
    return model
