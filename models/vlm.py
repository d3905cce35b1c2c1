"""The vision-language model: a vision encoder, a projector and a language model, joined at the embedding.

    tiles_TSSC -> vision -> projector -> features_TPD
                                              | one feature for one image token
    input_ids_BL -> embedding_BLD ------------+--> decoder layers -> hidden_BLD -> head -> logits

T tiles, S the side of a tile in pixels, C channels, P image tokens a tile, B rows, L positions, D the language model's
width. Rows may hold several samples one after another: position ids that start again at 0 keep them apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.spec import ImageSpec, TextSpec
from models.vision import VisionEncoder


class VLM(nn.Module):
    """Owns the three parts and how they join; knows nothing of losses, data or stages."""

    mean_C: Tensor
    std_C: Tensor

    def __init__(
        self, vision: VisionEncoder, projector: nn.Module, language: Any, *, image: ImageSpec, text: TextSpec
    ) -> None:
        super().__init__()
        self.vision = vision
        self.projector = projector
        self.language = language
        self.image = image
        self.image_token_id = text.image_token_id
        self.register_buffer("mean_C", torch.tensor(image.mean), persistent=False)
        self.register_buffer("std_C", torch.tensor(image.std), persistent=False)

    def forward(self, input_ids_BL: Tensor, position_ids_BL: Tensor, tiles_TSSC: Tensor) -> Tensor:
        """The last hidden states [B, L, D] of rows of samples; `tiles_TSSC` are the rows' pictures in order, uint8."""
        embedded_BLD = self.embed(input_ids_BL, self.normalise(tiles_TSSC))
        output = self.language.get_decoder()(
            inputs_embeds=embedded_BLD, position_ids=position_ids_BL, attention_mask=None, use_cache=False
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., D]."""
        logits: Tensor = self.language.get_output_embeddings()(hidden)
        return logits

    def normalise(self, tiles_TSSC: Tensor) -> Tensor:
        """uint8 tiles -> pixels [T, C, S, S], normalised as the vision encoder wants them."""
        pixels_TSSC = (tiles_TSSC.to(torch.float32) / 255.0 - self.mean_C) / self.std_C
        pixels_TCSS: Tensor = pixels_TSSC.permute(0, 3, 1, 2)
        return pixels_TCSS

    def embed(self, input_ids_BL: Tensor, pixels_TCSS: Tensor) -> Tensor:
        """The language model's input [B, L, D]: text embeddings, with picture features at the image tokens.

        Raises ValueError where the number of image tokens and of features differ. Rows without any picture still run
        one blank tile through vision and projector, times 0, so that every rank takes part in the same collectives.
        """
        is_image_BL = input_ids_BL == self.image_token_id
        embedded_BLD: Tensor = self.language.get_input_embeddings()(input_ids_BL.masked_fill(is_image_BL, 0))
        if pixels_TCSS.shape[0] == 0:
            blank = pixels_TCSS.new_zeros(1, 3, self.image.size, self.image.size)
            joined: Tensor = embedded_BLD + 0.0 * self.projector(self.vision(blank)).sum().to(embedded_BLD.dtype)
            return joined
        features_TPD = self.projector(self.vision(pixels_TCSS))
        num_features = features_TPD.shape[0] * features_TPD.shape[1]
        num_tokens = int(is_image_BL.sum())
        if num_tokens != num_features:
            raise ValueError(f"{num_tokens} image tokens in the rows, but {num_features} features from the pictures")
        features = features_TPD.reshape(num_features, -1).to(embedded_BLD.dtype)
        joined = embedded_BLD.masked_scatter(is_image_BL.unsqueeze(-1), features)
        return joined
