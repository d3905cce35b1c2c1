"""A dual encoder (CLIP, SigLIP and their kind) from a Hugging Face folder: images and texts as unit vectors.

Texts are padded to the model's full length, as in training, so a vector does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.images import open_image
from eval.images import StoredImage
from models.common.documents import read_json
from models.common.errors import InputError
from models.loading import load_whole, opening
from models.opening import open_processor

_ADVICE = "fetch or copy it again"
_LONGEST_TEXT = 512
"""A tokenizer without a limit of its own names a number beyond any model."""


def is_dual_encoder(folder: Path) -> bool:
    """Whether the folder's config.json names a model that compares images and texts."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES as KINDS

    try:
        kind = read_json(folder, "config.json").get("model_type")
    except (InputError, OSError):
        return False
    return isinstance(kind, str) and kind in KINDS


class DualEncoder:
    """Embeds images and texts; both have E values and length 1, so their product is the cosine."""

    def __init__(self, model: Any, processor: Any, device: torch.device) -> None:
        self.model, self.processor, self.device = model.eval().to(device), processor, device
        self._dtype = next(each.dtype for each in model.parameters() if each.is_floating_point())
        text = model.config.text_config
        limit = int(getattr(text, "max_position_embeddings", _LONGEST_TEXT))
        self._max_length = min(limit, int(getattr(processor.tokenizer, "model_max_length", limit)))

    @classmethod
    def open(cls, folder: Path, device: str) -> DualEncoder:
        """Open the model on `device` ("auto" is the first GPU, else the CPU).

        Raises:
            InputError: it is damaged.
        """
        from transformers import AutoModel

        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        with opening(folder, "can't be opened as a dual encoder", _ADVICE):
            model = load_whole(
                AutoModel.from_pretrained, folder, advice=_ADVICE, local_files_only=True, trust_remote_code=False
            )
            processor = open_processor(folder)
        return cls(model, processor, torch.device(place))

    @torch.no_grad()
    def images(self, sources: Sequence[Path | StoredImage]) -> Tensor:
        """The vectors of images, [N, E] float32 on the CPU."""
        opened = [open_image(source if isinstance(source, Path) else source.read()) for source in sources]
        pixels = self.processor.image_processor(images=opened, return_tensors="pt")["pixel_values"]
        return _unit(self.model.get_image_features(pixel_values=pixels.to(self.device, self._dtype)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """The vectors of texts, [N, E] float32 on the CPU; what is longer than the model reads is cut, as published."""
        tokens = self.processor.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._max_length, return_tensors="pt"
        )
        return _unit(self.model.get_text_features(**tokens.to(self.device)))


def _unit(found: Any) -> Tensor:
    """transformers 5 returns an output object where 4 returned the vectors."""
    vectors: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return F.normalize(vectors.float(), dim=-1).cpu()
