"""Reads prompts: from ids and pixels to keys, values and the logits of the first token.

    Prompt -- begins like a chat that is kept? --> its keys and values, and the rest of the ids ---.
       '----- images: features that are kept, or the vision encoder ------------------------------+--> DynamicKVCache

Prompts that come together are read together, in a cache of their own. Owns what of a prompt need not be read again, by
its two memories. Does not own the rows that are running (`eval.batch`).

G prompts, T ids to read, V vocabulary, P image tokens, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval.kept_chats import KeptChats
from eval.kv_cache import DynamicKVCache
from eval.lru_cache import LruCache
from eval.pixels import stack_pixels
from eval.prompts import Prompt, collate


class PromptReader:
    """Reads prompts with a model, whose weights must not change while there are memories.

    Args:
        pad_id: what stands before shorter prompts.
        features: projected features that are kept; None reads pixels each time. Needs a model with transformers'
            `get_image_features`.
        chats: beginnings of chats that are kept; None reads each prompt whole.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        *,
        pad_id: int,
        features: LruCache[bytes, Tensor] | None = None,
        chats: KeptChats | None = None,
    ) -> None:
        self.features, self.chats = features, chats
        self._model, self.device, self._pad_id = model, device, pad_id
        self._pixel_dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    @torch.no_grad()
    def read(self, prompts: Sequence[Prompt]) -> tuple[DynamicKVCache, Tensor]:
        """The prompts' keys and values, and the logits [G, V] after their last tokens."""
        known = [self.chats.find(prompt) if self.chats is not None else None for prompt in prompts]
        cache = DynamicKVCache.of_beginnings(self._model, known)
        has_positions = any(prompt.positions_3L is not None for prompt in prompts)
        rest = [
            prompt.from_token(begun.length, has_positions=has_positions) if begun is not None else prompt
            for prompt, begun in zip(prompts, known, strict=True)
        ]
        logits_GV = cache.read(self.inputs(rest))
        if any(begun is not None for begun in known):  # what was known is padded too
            cache.pack()
        return cache, logits_GV

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The model's inputs for prompts, padded on the left: ids, mask, positions, and images in one form or other."""
        if self.features is None or not any(prompt.pixels for prompt in prompts):
            return self.collate(prompts, side="left")
        texts = [Prompt(prompt.ids) for prompt in prompts]
        return self.collate(texts, side="left") | {"mm_encoder_outputs": {"image": self._features(prompts)}}

    def collate(self, prompts: Sequence[Prompt], *, side: Any) -> dict[str, Tensor]:
        """The model's inputs for prompts, images as pixels in the model's dtype."""
        return self._cast(collate(prompts, pad_id=self._pad_id, side=side, device=self.device))

    def _cast(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self._pixel_dtype)
        return inputs

    def _features(self, prompts: Sequence[Prompt]) -> Any:
        """Features of all images in their order, in the form in which a Llava takes them instead of pixels."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        assert self.features is not None
        wanted = [(digest, prompt, place) for prompt in prompts for place, digest in enumerate(prompt.pixels.digests)]
        found = {digest: self.features.find(digest) for digest, _, _ in wanted}
        missing = {digest: prompt.pixels.image(place) for digest, prompt, place in wanted if found[digest] is None}
        if missing:
            computed = self._computed(list(missing.values()))
            for digest, features_PD in zip(missing, computed, strict=True):
                # A copy: features of one image are a part of those that were computed with them.
                self.features.keep(digest, features_PD.clone(), features_PD.nbytes)
                found[digest] = features_PD
        return BaseModelOutputWithPooling(pooler_output=[found[digest] for digest, _, _ in wanted])

    def _computed(self, images: Sequence[dict[str, Tensor]]) -> Sequence[Tensor]:
        """The features [P, D] of each image, by one call of the vision encoder and the projector."""
        config = self._model.config
        return self._model.get_image_features(
            **self._cast(stack_pixels(images, self.device)),
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        ).pooler_output
