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

from models.attention import Segments
from models.decoder import Packed, packed_decoder
from models.images import Images
from models.native.tower import NativeTower
from models.patch_plan import PatchPlan
from models.patches import rope_of_samples
from models.quantized import follow_weights
from models.scaled_head import output_head
from models.spec import ImageSizes, ImageSpec, TextSpec
from models.vision import ImageFeatures, VisionEncoder


class VLM(nn.Module):
    """Owns the three parts and how they join; does not depend on losses, data or stages."""

    mean_C: Tensor
    std_C: Tensor

    def __init__(
        self,
        vision: VisionEncoder | NativeTower,
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
        self.grid = text.grid
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
        lengths = [end - start for start, end in pairwise(beginnings)]
        rope_3N = None
        if self.grid is not None:
            is_image = [part_L.numpy() for part_L in (ids_N == self.image_token_id).cpu().split(lengths)]
            rope_3N = torch.from_numpy(rope_of_samples(is_image, image_sizes, self.grid)).to(ids_N.device)
        packed = Packed(
            input_ids_N=ids_N,
            position_ids_N=positions_N,
            image_I=(ids_N == self.image_token_id).nonzero().squeeze(1),
            segments=Segments.of(torch.tensor(beginnings, dtype=torch.int32, device=ids_N.device), lengths),
            rope_3N=rope_3N,
        )
        features = self._features(self.normalise(tiles_TSSC), image_sizes)
        return self._decoded(packed, features).unflatten(0, input_ids_BL.shape)

    def hidden_states(self, packed: Packed, images: Images) -> Tensor:
        """The last hidden states of samples one after another, [K, D] where they are wanted, else [N, D].

        Raises ValueError where the number of image tokens and of features differ. Nothing here waits for the device.
        """
        return self._decoded(packed, self._features_of(images))

    def mtp_states(self, packed: Packed, images: Images) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`hidden_states` everywhere, [N, D], and for each head for further tokens the states [N, D] that predict its.

        The value at a sample's last position, where no next token is known, is undefined.
        """
        assert self.future is not None, "the recipe's model.future says which heads there are"
        joined_ID, deep = self._features_of(images)
        embedded_ND = self._join(packed.input_ids_N, packed.image_I, joined_ID)
        hidden_ND = self.decoder(embedded_ND, replace(packed, wanted_K=None, deep=deep))
        next_1ND = embedded_ND.roll(-1, dims=0).unsqueeze(0)
        states = self.future(hidden_ND.unsqueeze(0), next_1ND, segments=packed.segments)
        return hidden_ND, tuple(states_1ND.squeeze(0) for states_1ND in states)

    def _decoded(self, packed: Packed, features: ImageFeatures) -> Tensor:
        embedded_ND = self._join(packed.input_ids_N, packed.image_I, features.joined_ID)
        return self.decoder(embedded_ND, replace(packed, deep=features.deep))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., D]."""
        logits: Tensor = output_head(self.language)(hidden)
        return logits

    def normalise(self, tiles_TSSC: Tensor) -> Tensor:
        """uint8 tiles -> pixels [T, C, S, S], normalised for the vision encoder."""
        pixels_TSSC = (tiles_TSSC.to(torch.float32) / 255.0 - self.mean_C) / self.std_C
        pixels_TCSS: Tensor = pixels_TSSC.permute(0, 3, 1, 2)
        return pixels_TCSS

    def decoder_inputs(
        self,
        input_ids_BL: Tensor,
        pixels_TCSS: Tensor,
        image_sizes: ImageSizes = (),
        position_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        """What the language model's own forward takes instead of ids: text embeddings with image features among them.

        With M-RoPE also positions [3, B, L], unless `position_ids` gives some, and what is added after the first
        layers. Raises ValueError where the number of image tokens and of features differ.
        """
        is_image_BL = input_ids_BL == self.image_token_id
        image_I = is_image_BL.flatten().nonzero().squeeze(1)
        features = self._features(pixels_TCSS, image_sizes)
        joined_ND = self._join(input_ids_BL.flatten(), image_I, features.joined_ID)
        inputs: dict[str, Any] = {"inputs_embeds": joined_ND.unflatten(0, input_ids_BL.shape)}
        if features.deep:
            inputs["deep"] = (image_I, features.deep)
        if position_ids is None and self.grid is not None:
            rows = rope_of_samples([row_L.numpy() for row_L in is_image_BL.cpu()], image_sizes, self.grid)
            position_ids = torch.from_numpy(rows).to(input_ids_BL.device).unflatten(1, input_ids_BL.shape)
        return inputs if position_ids is None else {**inputs, "position_ids": position_ids}

    def respond(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, sizes: Tensor | None = None, **options: Any
    ) -> Any:
        """The language model's output for the output of a transformers processor; `options` go to it (cache, ...).

        `pixel_values` [N, C, S, S] are the rows' images in order. Under AnyRes they are [N, T, C, S, S], and `sizes`
        [N, 2] (the processor's `image_sizes`) gives each image's size, which determines how many of the T tiles are
        real. At native resolution they are rows of patches, and `sizes` [N, 3] the processor's `image_grid_thw`.
        """
        inputs = self.processed_inputs(input_ids, pixel_values, sizes, options.pop("position_ids", None))
        return self.language(**inputs, **options)

    def processed_inputs(
        self, input_ids: Tensor, pixel_values: Tensor | None, sizes: Tensor | None, position_ids: Tensor | None = None
    ) -> dict[str, Any]:
        """`decoder_inputs` for the output of a transformers processor: see `respond`."""
        if pixel_values is not None:
            pixels, found = self.vision.from_processor(pixel_values, sizes, self.image)
            return self.decoder_inputs(input_ids, pixels, found, position_ids)
        inputs = {"inputs_embeds": self.language.get_input_embeddings()(input_ids)}
        return inputs if position_ids is None else {**inputs, "position_ids": position_ids}

    def _features_of(self, images: Images) -> ImageFeatures:
        return self._features(self.normalise(images.tiles_TSSC), images.sizes, images.plan)

    def _features(self, pixels_TCSS: Tensor, sizes: ImageSizes, plan: PatchPlan | None = None) -> ImageFeatures:
        """See `VisionEncoder.image_features`."""
        return self.vision.image_features(self.projector, pixels_TCSS, sizes, spec=self.image, plan=plan)

    def _join(self, input_ids_N: Tensor, image_I: Tensor, features_ID: Tensor) -> Tensor:
        """Text embeddings [N, D] with the features in the places `image_I`."""
        if len(image_I) != len(features_ID):
            raise ValueError(
                f"{len(image_I)} image tokens in the rows, but {len(features_ID)} features from the images"
            )
        is_image_N = input_ids_N == self.image_token_id
        embedded_ND: Tensor = self.language.get_input_embeddings()(input_ids_N.masked_fill(is_image_N, 0))
        return embedded_ND.index_copy(0, image_I, features_ID.to(embedded_ND.dtype))
