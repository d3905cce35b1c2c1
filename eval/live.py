"""A model in training with the interface that a Predictor expects of a bundle's model.

Owns the few lines between `VLM`'s own calls and the calls of a Hugging Face image-text-to-text model. Does not own
either model, and keeps no weights of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.common.errors import InputError
from models.vlm import VLM


class InterruptedAnswerError(Exception):
    """`should_stop` returned True in the middle of an answer: the run was asked to stop."""


class LiveModel(nn.Module):
    """Gives a `VLM` the `forward` (with a cache) and `generate` of `LlavaForConditionalGeneration`.

    Args:
        generation_config: whose end tokens count; by default the language model's own.
        autocast: compute in this dtype over fp32 weights, as training does; float32: in the weights' own dtype.
        should_stop: called before every forward, so once per token; True raises `InterruptedAnswerError`.
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        generation_config: Any = None,
        autocast: torch.dtype = torch.float32,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self.vlm = vlm
        self.config = vlm.language.config
        self.generation_config = generation_config or vlm.language.generation_config
        self.should_stop = should_stop
        self._autocast = autocast

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The language model's output for a processor's: see `VLM.respond`."""
        if self.should_stop():
            raise InterruptedAnswerError
        sizes = _sizes(image_sizes, batch_num_images) if image_grid_thw is None else image_grid_thw
        with torch.autocast(input_ids.device.type, self._autocast, enabled=self._autocast != torch.float32):
            return self.vlm.respond(input_ids, pixel_values, sizes, **options)

    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Token ids [B, L + N]: the prompt's L, then N new ones; `options` go to transformers' `generate`.

        Raises InputError for a model whose positions are by row and column, which `generate` would not know here.
        """
        if image_grid_thw is not None:
            raise InputError("a model of native resolution in training answers greedily: set num_beams: 1")
        with torch.autocast(input_ids.device.type, self._autocast, enabled=self._autocast != torch.float32):
            inputs = self.vlm.processed_inputs(input_ids, pixel_values, _sizes(image_sizes, batch_num_images))
            new_ids = self.vlm.language.generate(**inputs, **options)
        return torch.cat([input_ids, new_ids], dim=1)


def _sizes(image_sizes: Tensor | None, batch_num_images: Tensor | None) -> Tensor | None:
    """Sizes [N, 2], `WHOLE` for images beside others in a prompt where the processor tells how many a prompt has."""
    if image_sizes is None or batch_num_images is None:
        return image_sizes
    num_beside_N = batch_num_images.repeat_interleave(batch_num_images)
    return image_sizes.masked_fill((num_beside_N > 1)[:, None], 0)
