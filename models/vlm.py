"""The vision-language model: a vision encoder, a projector and a language model, joined at the embedding.

    tiles_TSSC -> vision -> projector -> features_TPD
                                              | one feature for one image token
    input_ids_N -> embedding_ND --------------+--> decoder layers -> hidden_KD -> head -> logits

T tiles, S the side of a tile in pixels, C channels, P image tokens a tile, B rows, L positions, N tokens of packed
samples, I image tokens among them, K positions whose hidden states are wanted, D the language model's width.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from models.anyres import arrangement, real_tiles, shrink
from models.attention import Segments
from models.decoder import Packed, packed_decoder
from models.images import Images
from models.quantized import follow_weights
from models.scaled_head import output_head
from models.spec import ImageSizes, ImageSpec, TextSpec
from models.vision import VisionEncoder


class VLM(nn.Module):
    """Owns the three parts and how they join; does not depend on losses, data or stages."""

    mean_C: Tensor
    std_C: Tensor

    def __init__(
        self,
        vision: VisionEncoder,
        projector: nn.Module,
        language: Any,
        *,
        image: ImageSpec,
        text: TextSpec,
        mtp: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.projector: Any = projector
        self.language = language
        self.future = mtp  # heads for further tokens; checkpoints have this name
        self.decoder = packed_decoder(language)
        self.image = image
        self.image_token_id = text.image_token_id
        self.register_buffer("mean_C", torch.tensor(image.mean), persistent=False)
        self.register_buffer("std_C", torch.tensor(image.std), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> VLM:
        """What `to`, `cuda` and `half` call; int8 layers' scales come along."""
        super()._apply(fn, recurse)
        follow_weights(self)
        return self

    def forward(
        self, input_ids_BL: Tensor, position_ids_BL: Tensor, tiles_TSSC: Tensor, image_sizes: ImageSizes = ()
    ) -> Tensor:
        """The last hidden states [B, L, D] of rows; `tiles_TSSC` are the rows' images in order, uint8.

        A row may hold several samples: position ids that start again at 0 keep them apart. Finding the samples waits
        for the device; `hidden_states` does not.
        """
        ids_N, positions_N = input_ids_BL.flatten(), position_ids_BL.flatten()
        beginnings = [*(positions_N == 0).nonzero().squeeze(1).tolist(), len(positions_N)]
        packed = Packed(
            input_ids_N=ids_N,
            position_ids_N=positions_N,
            image_I=(ids_N == self.image_token_id).nonzero().squeeze(1),
            segments=Segments.of(
                torch.tensor(beginnings, dtype=torch.int32, device=ids_N.device),
                [end - start for start, end in pairwise(beginnings)],
            ),
        )
        return self.decoder(self._embedded(packed, tiles_TSSC, image_sizes), packed).unflatten(0, input_ids_BL.shape)

    def hidden_states(self, packed: Packed, images: Images) -> Tensor:
        """The last hidden states of samples one after another, [K, D] where they are wanted, else [N, D].

        Raises ValueError where the number of image tokens and of features differ. Nothing here waits for the device.
        """
        return self.decoder(self._embedded(packed, images.tiles_TSSC, images.sizes), packed)

    def mtp_states(self, packed: Packed, images: Images) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`hidden_states` everywhere, [N, D], and for each head for further tokens the states [N, D] that predict its.

        The value at a sample's last position, where no next token is known, is undefined.
        """
        assert self.future is not None, "the recipe's model.future says which heads there are"
        embedded_ND = self._embedded(packed, images.tiles_TSSC, images.sizes)
        hidden_ND = self.decoder(embedded_ND, replace(packed, wanted_K=None))
        next_1ND = embedded_ND.roll(-1, dims=0).unsqueeze(0)
        states = self.future(hidden_ND.unsqueeze(0), next_1ND, segments=packed.segments)
        return hidden_ND, tuple(states_1ND.squeeze(0) for states_1ND in states)

    def _embedded(self, packed: Packed, tiles_TSSC: Tensor, image_sizes: ImageSizes) -> Tensor:
        features_ID = self._features(self.normalise(tiles_TSSC), image_sizes)
        return self._join(packed.input_ids_N, packed.image_I, features_ID)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., D]."""
        logits: Tensor = output_head(self.language)(hidden)
        return logits

    def normalise(self, tiles_TSSC: Tensor) -> Tensor:
        """uint8 tiles -> pixels [T, C, S, S], normalised for the vision encoder."""
        pixels_TSSC = (tiles_TSSC.to(torch.float32) / 255.0 - self.mean_C) / self.std_C
        pixels_TCSS: Tensor = pixels_TSSC.permute(0, 3, 1, 2)
        return pixels_TCSS

    def embed(self, input_ids_BL: Tensor, pixels_TCSS: Tensor, image_sizes: ImageSizes = ()) -> Tensor:
        """The language model's input [B, L, D]: text embeddings, with image features at the image tokens.

        Raises ValueError where the number of image tokens and of features differ.
        """
        image_I = (input_ids_BL.flatten() == self.image_token_id).nonzero().squeeze(1)
        joined_ND = self._join(input_ids_BL.flatten(), image_I, self._features(pixels_TCSS, image_sizes))
        return joined_ND.unflatten(0, input_ids_BL.shape)

    def respond(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, image_sizes: Tensor | None = None, **options: Any
    ) -> Any:
        """The language model's output for the output of a transformers processor; `options` go to it (cache, ...).

        `pixel_values` [N, C, S, S] are the rows' images in order. Under AnyRes they are [N, T, C, S, S], and
        `image_sizes` [N, 2] gives each image's size, which determines how many of the T tiles are real.
        """
        return self.language(inputs_embeds=self.embed_inputs(input_ids, pixel_values, image_sizes), **options)

    def embed_inputs(self, input_ids: Tensor, pixel_values: Tensor | None, image_sizes: Tensor | None) -> Tensor:
        """The language model's input [B, L, D] for the output of a transformers processor."""
        if pixel_values is not None:
            return self.embed(input_ids, *real_tiles(self.image, pixel_values, image_sizes))
        embedded: Tensor = self.language.get_input_embeddings()(input_ids)
        return embedded

    def _features(self, pixels_TCSS: Tensor, image_sizes: ImageSizes) -> Tensor:
        """Projected features [I, D] in the order of the image tokens; [0, D] without images.

        Without images one blank tile is run, so that every rank takes part in the same collectives and every weight has
        a gradient (of 0).
        """
        is_blank = pixels_TCSS.shape[0] == 0
        if is_blank:
            pixels_TCSS = pixels_TCSS.new_zeros(1, 3, self.image.size, self.image.size)
        features_FD: Tensor = self.projector(self.vision(pixels_TCSS)).flatten(0, 1)
        if self.image.fit.is_tiled:
            num_features, features_FD = len(features_FD), self.projector.newline(features_FD)
            order_I = arrangement(self.image, image_sizes)
            if not is_blank and (not len(order_I) or int(order_I.max()) != num_features):
                raise ValueError(f"images of the sizes {list(image_sizes)} do not have {len(pixels_TCSS)} tiles")
            features_FD = features_FD.index_select(0, order_I.to(features_FD.device, non_blocking=True))
            features_FD = features_FD if is_blank else shrink(self.image, features_FD, image_sizes)
        return features_FD[:0] if is_blank else features_FD

    def _join(self, input_ids_N: Tensor, image_I: Tensor, features_ID: Tensor) -> Tensor:
        """Text embeddings [N, D] with the features in the places `image_I`."""
        if len(image_I) != len(features_ID):
            raise ValueError(
                f"{len(image_I)} image tokens in the rows, but {len(features_ID)} features from the images"
            )
        is_image_N = input_ids_N == self.image_token_id
        embedded_ND: Tensor = self.language.get_input_embeddings()(input_ids_N.masked_fill(is_image_N, 0))
        return embedded_ND.index_copy(0, image_I, features_ID.to(embedded_ND.dtype))
