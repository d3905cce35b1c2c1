"""Language models: causal decoders of transformers, with their tokenizer.

Owns loading. Does not own adapters (the trainer puts them on) or prompts (the data pipeline writes them).
"""

from __future__ import annotations

from typing import Any

import torch

from models.config import DecoderLanguage, LanguageConfig, PretrainedLanguage
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


def decoder_facts(config: DecoderLanguage, vocab_size: int) -> dict[str, Any]:
    """What a config.json would say of a new decoder's shape."""
    return {
        "model_type": "sightline_decoder",
        "vocab_size": vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.inner or -(-config.width * 8 // 96) * 32,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": True,
    }


def decoder_shape(config: DecoderLanguage, tokenizer: Any) -> Any:
    """The configuration of a new decoder for a tokenizer, all of whose tokens it knows."""
    from models.own_decoder import OwnDecoderConfig

    facts = decoder_facts(config, len(tokenizer))
    facts.pop("model_type")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return OwnDecoderConfig(**facts, **ids, use_cache=False)


def build_decoder(shape: Any) -> Any:
    """A new decoder in fp32, from torch's global generator."""
    from models.own_decoder import OwnDecoderForCausalLM

    return OwnDecoderForCausalLM(shape).eval()


def load_tokenizer(config: LanguageConfig) -> Any:
    """The language model's tokenizer, with the image token added and a padding token chosen.

    A tokenizer without a padding token pads with its unknown or end token: padding is told from text by position,
    never by its id, so that sharing one is safe.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory_of(config.tokenizer_path))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return _with_image_token(tokenizer)


def load_encoder_tokenizer(path: str) -> Any:
    """A text encoder's tokenizer (BERT's), with the image token; its first and last token count as begin and end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory_of(path))
    if tokenizer.cls_token is None or tokenizer.sep_token is None or tokenizer.pad_token is None:
        raise InputError(f"{path}: its tokenizer lacks [CLS], [SEP] or [PAD]; a BERT's is expected")
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    return _with_image_token(tokenizer)


def _with_image_token(tokenizer: Any) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer


def text_spec(path: str, tokenizer: Any, max_length: int, *, num_beside: int = 0) -> TextSpec:
    """What the model at `path` takes; `max_length` beyond its own context is refused.

    `num_beside` positions of a row do not count, since the model has no positions for them.
    """
    directory = directory_of(path)
    facts = read_json(directory, "config.json")
    context = int(facts.get("max_position_embeddings", max_length)) + num_beside
    if max_length > context:
        raise InputError(f"data.max_length: {max_length} is more than the {context} positions of {directory}")
    return _spec(tokenizer, max_length, int(facts["vocab_size"]))


def decoder_text_spec(config: DecoderLanguage, tokenizer: Any, max_length: int) -> TextSpec:
    """What a new decoder takes; its vocabulary is all of the tokenizer's."""
    if max_length > config.max_positions:
        raise InputError(f"data.max_length: {max_length} is more than model.language.max_positions")
    return _spec(tokenizer, max_length, len(tokenizer))


def _spec(tokenizer: Any, max_length: int, vocab_size: int) -> TextSpec:
    return TextSpec(
        max_length=max_length,
        image_token_id=int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),
        pad_token_id=int(tokenizer.pad_token_id),
        vocab_size=vocab_size,
    )
