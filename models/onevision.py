"""LLaVA-OneVision's processor without its part for videos, which transformers makes with torchvision alone.

Images and text are processed by the stock methods. Videos are not trained here.
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaOnevisionProcessor
from transformers.processing_utils import ProcessorMixin


class ImagesOnlyProcessor(LlavaOnevisionProcessor):
    """`LlavaOnevisionProcessor` for images and text; the arguments are its own."""

    def __init__(  # noqa: PLR0917 - transformers hands them over by place
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        vision_aspect_ratio: str = "anyres_max_9",
        **others: Any,
    ) -> None:
        del others  # of videos
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.vision_aspect_ratio = vision_aspect_ratio
        self.image_token = getattr(tokenizer, "image_token", image_token)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
