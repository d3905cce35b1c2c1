"""Qwen-VL's processors without their part for videos, which transformers makes with torchvision alone.

Images and text are processed by the stock methods. Videos are not trained here.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

_TOKENS = ("image", "video", "vision_start", "vision_end")


class Qwen2VLImagesProcessor(Qwen2VLProcessor):
    """`Qwen2VLProcessor` for images and text."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **others: Any
    ) -> None:
        del others  # of videos
        _put_tokens(self, tokenizer)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Qwen2_5_VLImagesProcessor(Qwen2_5_VLProcessor):  # noqa: N801 - as transformers spells it
    """`Qwen2_5_VLProcessor` for images and text."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **others: Any
    ) -> None:
        del others  # of videos
        _put_tokens(self, tokenizer)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Qwen3VLImagesProcessor(Qwen3VLProcessor):
    """`Qwen3VLProcessor` for images and text."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **others: Any
    ) -> None:
        del others  # of videos
        _put_tokens(self, tokenizer)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _put_tokens(processor: Any, tokenizer: Any) -> None:
    """The control tokens that the stock methods read, as the stock constructors find them."""
    for name in _TOKENS:
        pad = f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"
        token = getattr(tokenizer, f"{name}_token", pad)
        setattr(processor, f"{name}_token", token)
        setattr(processor, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
