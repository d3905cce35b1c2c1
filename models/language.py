"""Language models: causal decoders of transformers, with their tokenizer.

Owns loading. Does not own adapters (the trainer puts them on) or prompts (the data pipeline writes them).
"""

from __future__ import annotations

from typing import Any

import torch

from models.config import PretrainedLanguage
from models.errors import InputError
from models.source import directory_of, read_json
from models.spec import IMAGE_TOKEN, TextSpec


def load_language(config: PretrainedLanguage, dtype: torch.dtype) -> Any:
    """The causal language model that `config` names, in `dtype`, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    extra: dict[str, Any] = {}
    if config.load != "full":
        extra = {"quantization_config": quantization(config.load, dtype), "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        directory_of(config.path), dtype=dtype, attn_implementation="sdpa", **extra
    )
    model.config.use_cache = False  # a cache switches off the detection of packed rows
    return model.eval()


def quantization(load: str, dtype: torch.dtype, skip: list[str] | None = None) -> Any:
    """bitsandbytes' settings for `nf4` or `int8`; `skip` lists modules that stay as they are, by their full name."""
    from transformers import BitsAndBytesConfig

    if load == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=skip,
    )


def load_tokenizer(config: PretrainedLanguage) -> Any:
    """The language model's tokenizer, with the image token added and a padding token chosen.

    A tokenizer without a padding token pads with its unknown or end token: padding is told from text by position,
    never by its id, so that sharing one is safe.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory_of(config.path))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer


def text_spec(config: PretrainedLanguage, tokenizer: Any, max_length: int) -> TextSpec:
    """What the language model takes; `max_length` beyond its own context is refused."""
    directory = directory_of(config.path)
    facts = read_json(directory, "config.json")
    context = int(facts.get("max_position_embeddings", max_length))
    if max_length > context:
        raise InputError(f"data.max_length: {max_length} is more than the {context} positions of {directory}")
    return TextSpec(
        max_length=max_length,
        image_token_id=int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),
        pad_token_id=int(tokenizer.pad_token_id),
        vocab_size=int(facts["vocab_size"]),
    )
