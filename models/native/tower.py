"""A tower of native resolution: the patches of all images of a micro-batch -> features, each image by itself.

    patches_PCSS --> patch embedding --> blocks, of which some attend in windows --> features_PV, one a patch
                                          '-> after some blocks: further features_PV, for the decoder's first layers

The blocks are transformers' own. What they would compute of the images' sizes comes in a `PatchPlan`, and attention is
`models.attention`'s, over all images at once. The merger is apart (`models.native.merger`).

P patches, C channels, S a patch's side in pixels, V the tower's width, D the language model's width, I image tokens.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Segments, attend
from models.common.errors import InputError
from models.patch_plan import PatchPlan, plan_patches
from models.spec import ImageSizes, ImageSpec, PatchGrid
from models.vision import ImageFeatures

ATTENTION = "sightline_flash_attention_of_images"
"""A name with `flash_attention` inside: of others transformers splits the images itself, and waits for the device."""


MERGERS = ("merger", "deepstack_merger_list")
"""Attributes of a tower of transformers that `models.native.merger` has."""


class NativeTower(nn.Module):
    """A vision model of Qwen2-VL, Qwen2.5-VL or Qwen3-VL without its mergers.

    A frozen tower runs without an autograd graph, in its own dtype.
    """

    def __init__(self, model: Any, grid: PatchGrid) -> None:
        super().__init__()
        self.model, self.grid = model, grid
        config = model.config
        self._levels = tuple(getattr(config, "deepstack_visual_indexes", ()))
        self._in_windows = frozenset[int]()
        if grid.window is not None:
            self._in_windows = frozenset(range(len(model.blocks))) - set(config.fullatt_block_indexes)
        model.patch_embed.proj = FlatPatches(model.patch_embed.proj)
        config._attn_implementation = register()

    def keep_features(self, directory: Path, limit_gb: float) -> None:
        """Raises InputError: features are kept by square."""
        del directory, limit_gb
        raise InputError("model.keep_features: images of native resolution have no squares to keep; leave it out")

    @property
    def width(self) -> int:
        """V."""
        return int(getattr(self.model.config, "embed_dim", self.model.config.hidden_size))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the tower computes in."""
        return next(self.model.parameters()).dtype

    def image_features(
        self,
        projector: Any,
        pixels_PCSS: Tensor,
        sizes: ImageSizes,
        *,
        spec: ImageSpec,
        plan: PatchPlan | None = None,
    ) -> ImageFeatures:
        """See `VisionEncoder.image_features`. Raises ValueError where the images have another number of patches."""
        del spec
        plan = plan or plan_patches(self.grid, sizes).to(pixels_PCSS.device)
        is_blank = len(pixels_PCSS) == 0
        if is_blank:
            pixels_PCSS = pixels_PCSS.new_zeros(self.grid.merge**2, 3, self.grid.patch_size, self.grid.patch_size)
        if sum(plan.lengths) != len(pixels_PCSS):
            raise ValueError(f"images of the sizes {list(sizes)} do not have {len(pixels_PCSS)} patches")
        joined_ID, *deep = projector(self(pixels_PCSS, plan))
        if is_blank:
            return ImageFeatures(joined_ID[:0], tuple(features_ID[:0] for features_ID in deep))
        return ImageFeatures(joined_ID, tuple(deep))

    def without_weights(self) -> NativeTower:
        """See `VisionEncoder.without_weights`."""
        config = copy.deepcopy(self.model.config)
        config._attn_implementation = "sdpa"  # a constructor takes no name of ours
        return NativeTower(without_mergers(type(self.model)(config)), self.grid).eval()

    @staticmethod
    def from_processor(
        pixel_values: Tensor, sizes: Tensor | None, spec: ImageSpec
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """See `VisionEncoder.from_processor`; of the two equal frames one is taken."""
        assert sizes is not None, "the processor gives image_grid_thw"
        side = spec.patch_size
        pixels_PCSS = pixel_values.view(-1, 3, 2, side, side)[:, :, 0]
        return pixels_PCSS, [(rows * side, columns * side) for _, rows, columns in sizes.tolist()]

    @staticmethod
    def processor_pixels(pixels_PCSS: Tensor) -> Tensor:
        """Rows of two equal frames: see `VisionEncoder.processor_pixels`."""
        return _two_frames(pixels_PCSS).flatten(1)

    def probe(self, spec: ImageSpec) -> Tensor:
        """See `VisionEncoder.probe`."""
        del spec
        side = 2 * self.grid.factor
        rows, columns = self.grid.patches(side, side)
        device = next(self.parameters()).device
        pixels_PCSS = torch.zeros(rows * columns, 3, self.grid.patch_size, self.grid.patch_size, device=device)
        return torch.stack(
            [each.sum() for each in self(pixels_PCSS, plan_patches(self.grid, [(side, side)]).to(device))]
        ).sum()

    def forward(self, pixels_PCSS: Tensor, plan: PatchPlan) -> tuple[Tensor, ...]:
        """Features [P, V] of normalised patches: those of the last block, then those for the decoder's layers."""
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            return self._features(pixels_PCSS, plan)
        with torch.no_grad(), torch.autocast(pixels_PCSS.device.type, enabled=False):
            return self._features(pixels_PCSS, plan)

    def _features(self, pixels_PCSS: Tensor, plan: PatchPlan) -> tuple[Tensor, ...]:
        model = self.model
        hidden_PV = model.patch_embed(_two_frames(pixels_PCSS.to(self.dtype)))
        if plan.taps_P4 is not None and plan.weights_P4 is not None:
            learnt_PV = (model.pos_embed(plan.taps_P4) * plan.weights_P4[:, :, None]).sum(1)
            hidden_PV = hidden_PV + learnt_PV.to(hidden_PV.dtype)
        if plan.order_P is not None:
            hidden_PV = hidden_PV.index_select(0, plan.order_P)
        rotary = model.rotary_pos_emb(hidden_PV, plan.places_P2)
        images = Segments.of(plan.starts_G1, plan.lengths, is_causal=False)
        windows = images
        if plan.window_starts_W1 is not None:
            windows = Segments.of(plan.window_starts_W1, plan.window_lengths, is_causal=False)
        levels = []
        for place, block in enumerate(model.blocks):
            segments = windows if place in self._in_windows else images
            hidden_PV = block(
                hidden_PV,
                cu_seqlens=segments.starts_G1,
                max_seqlen=segments.longest,
                position_embeddings=rotary,
                segments=segments,
            )
            if place in self._levels:
                levels.append(hidden_PV)
        if plan.inverse_P is not None:
            hidden_PV = hidden_PV.index_select(0, plan.inverse_P)
        return hidden_PV, *levels


def _two_frames(pixels_PCSS: Tensor) -> Tensor:
    """A still image is two equal frames: [P, C, S, S] -> [P, C, 2, S, S]."""
    return pixels_PCSS.unsqueeze(2).expand(-1, -1, 2, -1, -1).contiguous()


def without_mergers(model: Any) -> Any:
    """A tower of transformers without its mergers, which are the projector's."""
    for name in MERGERS:
        if hasattr(model, name):
            delattr(model, name)
    return model


class FlatPatches(nn.Module):
    """The patch embedding as one matrix product over the weight of its convolution, which keeps its name and shape.

    The patches do not overlap, so it is the same; a convolution of three dimensions is many times slower, on CPUs and
    on GPUs (https://github.com/pytorch/pytorch/issues/174051).
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias

    def forward(self, pixels_PCTSS: Tensor) -> Tensor:
        """[P, 3, 2, S, S] -> [P, V]."""
        return F.linear(pixels_PCTSS.flatten(1), self.weight.flatten(1), self.bias)


def register() -> str:
    """Make the tower's attention function known to transformers, under the name that is returned."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    return ATTENTION


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    segments: Segments,
    dropout: float = 0.0,
    **lengths: Any,
) -> tuple[Tensor, None]:
    """What a block calls; `lengths` are those of `segments`, once more."""
    del lengths
    return attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, segments=segments)
