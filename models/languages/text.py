"""Tokenizers, and the limits and special tokens of a text model. Loads without torch.

Owns the image token, padding, and the check of lengths. Does not own prompts (`data_pipeline.templates`).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models.common.documents import read_json, understanding
from models.common.errors import InputError, single_line
from models.common.source import directory_of
from models.loading import opening
from models.spec import IMAGE_TOKEN, TextSpec


def load_tokenizer(path: str) -> Any:
    """A language model's tokenizer, with the image token added and a padding token chosen.

    A tokenizer without a padding token pads with its unknown or end token: padding is recognised by position, never by
    its id, so sharing one is safe.
    """
    from transformers import AutoTokenizer

    directory = directory_of(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # of transformers, tokenizers, SentencePiece
        raise InputError(f"{directory}: its tokenizer cannot be opened: {_reason(directory, error)}") from error
    return with_padding(tokenizer)


def with_padding(tokenizer: Any, image_token: str = IMAGE_TOKEN) -> Any:
    """The tokenizer with the image token, and a padding token where it has none."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return _with_image_token(tokenizer, image_token)


def _reason(directory: Path, error: Exception) -> str:
    """What is missing; transformers names tiktoken where SentencePiece is not installed."""
    is_sentencepiece = (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file()
    if is_sentencepiece and find_spec("sentencepiece") is None:
        return "it has tokenizer.model alone, which needs `pip install sentencepiece protobuf`"
    return single_line(error)


def load_encoder_tokenizer(path: str) -> Any:
    """A text encoder's tokenizer (BERT's), with the image token; its first and last token count as begin and end."""
    from transformers import AutoTokenizer

    directory = directory_of(path)
    with opening(directory, "has no tokenizer that can be opened", "fetch or copy it again"):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if tokenizer.cls_token is None or tokenizer.sep_token is None or tokenizer.pad_token is None:
        raise InputError(f"{path}: its tokenizer lacks [CLS], [SEP] or [PAD]; a BERT's is expected")
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    return _with_image_token(tokenizer)


def _with_image_token(tokenizer: Any, image_token: str = IMAGE_TOKEN) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    return tokenizer


def text_spec(path: str, tokenizer: Any, max_length: int, *, num_beside: int = 0) -> TextSpec:
    """The spec of the model at `path`; raises InputError where `max_length` is beyond its context.

    `num_beside` positions of a row do not count, since the model has no positions for them.
    """
    directory = directory_of(path)
    facts = read_json(directory, "config.json")
    with understanding(directory / "config.json"):
        context, vocab_size = facts.get("max_position_embeddings", max_length) + num_beside, int(facts["vocab_size"])
    if max_length > context:
        raise InputError(f"data.max_length: {max_length} is more than the {context} positions of {directory}")
    return make_spec(tokenizer, max_length, vocab_size)


def make_spec(tokenizer: Any, max_length: int, vocab_size: int, image_token: str = IMAGE_TOKEN) -> TextSpec:
    """A spec with the tokenizer's own ids.

    Raises:
        InputError: a token beside the image's has no row in the embedding.
    """
    homeless = {token: number for token, number in tokenizer.get_vocab().items() if number >= vocab_size}
    homeless.pop(image_token, None)  # its positions are filled with image features
    if homeless:
        named = ", ".join(sorted(homeless, key=lambda token: homeless[token])[:5])
        raise InputError(
            f"{tokenizer.name_or_path}: {len(homeless)} of the tokenizer's {len(tokenizer)} tokens ({named}) have no"
            f" row in the embedding, which has {vocab_size}; take the tokenizer that came with the weights"
        )
    return TextSpec(
        max_length=max_length,
        image_token=image_token,
        image_token_id=int(tokenizer.convert_tokens_to_ids(image_token)),
        pad_token_id=int(tokenizer.pad_token_id),
        vocab_size=vocab_size,
    )
