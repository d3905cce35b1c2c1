"""The parts of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whose images keep their size and proportions. Loads without torch.

visual.merger*, visual.deepstack_merger_list.*  -> projector
visual.*                                        -> vision      a tower of native resolution
all else                                        -> language    with positions by time, row and column
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from models.common.errors import InputError
from models.common.source import FindPart, PartFacts, read_part
from models.encoders.base import VisionClass, triple
from models.projectors.base import ProjectorConfig
from models.published.family import PublishedFacts, read_published
from models.published.image import BICUBIC, channel_statistics, open_published_processor
from models.published.language import PublishedLanguage
from models.published.vision import PublishedVision
from models.shapes import Linear, PatchShape, ProjectorShape, VisionShape
from models.spec import ImageFit, ImageSpec, NativeImage, PatchGrid, TextSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from models.native.tower import NativeTower

_TOWERS: Mapping[str, str] = {
    "qwen2_vl": "Qwen2VisionTransformerPretrainedModel",
    "qwen2_5_vl": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen3_vl": "Qwen3VLVisionModel",
}
_GATED = ("qwen2_5_vl",)
"""Families whose tower has three matrices in its MLP."""


def _tower_class(family: str) -> Any:
    return getattr(import_module(f"transformers.models.{family}.modeling_{family}"), _TOWERS[family])


def grid_of(facts: PublishedFacts) -> PatchGrid:
    """How the family's tower cuts an image. Raises InputError where it cuts it in a way that is not known here."""
    tower = facts.config.vision_config
    sides = tower.patch_size, tower.temporal_patch_size
    if not isinstance(sides[0], int) or sides[1] != 2:
        raise InputError(f"{facts.source}: patches of {sides[0]} pixels and {sides[1]} frames are not known here")
    window, places = getattr(tower, "window_size", None), getattr(tower, "num_position_embeddings", None)
    merge = int(tower.spatial_merge_size)
    return PatchGrid(
        patch_size=sides[0],
        merge=merge,
        window=None if window is None else window // merge // sides[0],
        table_side=None if places is None else math.isqrt(places),
    )


def native_fit(facts: PublishedFacts, min_tokens: int | None, max_tokens: int | None) -> ImageFit:
    """What the processor makes of an image, within bounds in image tokens; None: the processor's own.

    Raises:
        InputError: it does not make what the tower takes, or a bound above the other.
    """
    grid = grid_of(facts)
    if facts.directory is None and min_tokens is not None and max_tokens is not None:  # for estimates
        return NativeImage(
            grid=grid, min_pixels=min_tokens * grid.factor**2, max_pixels=max(min_tokens, max_tokens) * grid.factor**2
        )
    images = open_published_processor(facts).image_processor
    if int(images.resample) != BICUBIC or not images.do_resize or not images.do_normalize or not images.do_rescale:
        raise InputError(f"{facts.source}: its processor resizes by another filter than bicubic, or not at all")
    made = int(images.patch_size), int(images.merge_size), int(images.temporal_patch_size)
    if made != (grid.patch_size, grid.merge, 2):
        raise InputError(f"{facts.source}: its processor makes patches of {made}, and its tower takes others")
    size = dict(images.size)
    per_token = grid.factor**2
    smallest = int(size["shortest_edge"]) if min_tokens is None else min_tokens * per_token
    largest = int(size["longest_edge"]) if max_tokens is None else max_tokens * per_token
    if smallest > largest:
        raise InputError(
            f"model: an image has at least {smallest // per_token} tokens and at most {largest // per_token}; set"
            " model.min_image_tokens below model.max_image_tokens"
        )
    return NativeImage(grid=grid, min_pixels=smallest, max_pixels=largest)


class NativeVision(PublishedVision):
    """The tower of the VLM at `path`, without its mergers."""

    feature_layer: int = -1

    @property
    def num_extra_tokens(self) -> int:
        """None: a tower of native resolution has patches alone."""
        return 0

    def class_of(self, find: FindPart) -> VisionClass:
        """Its class in transformers."""
        return VisionClass(_TOWERS[read_published(self.path, find).family], 0, has_inner_model=False)

    def facts(self, find: FindPart = read_part) -> PartFacts:
        """The tower's part of config.json, completed by transformers' defaults."""
        found = read_published(self.path, find)
        return PartFacts(found.config.vision_config.to_dict(), found.source, found.directory)

    def image_spec(self, fit: ImageFit) -> ImageSpec:
        """The side of a patch, and the values of the VLM's own processor."""
        facts = read_published(self.path)
        side = grid_of(facts).patch_size
        mean, std = channel_statistics(open_published_processor(facts))
        return ImageSpec(size=side, patch_size=side, fit=fit, mean=triple(mean), std=triple(std))

    def shape(self, find: FindPart = read_part) -> VisionShape:
        """Widths and layers; a tile is a patch."""
        facts = read_published(self.path, find)
        tower, grid = facts.config.vision_config, grid_of(facts)
        width = int(getattr(tower, "embed_dim", tower.hidden_size))
        num_layers = int(tower.depth)
        return PatchShape(
            width=width,
            inner=int(getattr(tower, "intermediate_size", 0) or width * tower.mlp_ratio),
            num_layers=num_layers,
            num_patches=1,
            num_leading_tokens=0,
            patch_inputs=3 * 2 * grid.patch_size**2,
            patch_size=grid.patch_size,
            num_whole=num_layers if grid.window is None else len(tower.fullatt_block_indexes),
            is_gated=facts.family in _GATED,
        )

    def without_weights(self, find: FindPart = read_part) -> Any:
        """See `EncoderConfig.without_weights`; without the mergers, which are the projector's."""
        from models.native.tower import without_mergers

        facts = read_published(self.path, find)
        return without_mergers(_tower_class(facts.family)(facts.config.vision_config))

    def load(self, dtype: torch.dtype) -> NativeTower:  # type: ignore[override]  # another module, of the same use
        """The tower in `dtype`, in evaluation mode."""
        from models.native.tower import NativeTower, without_mergers

        model = self.load_model(dtype)
        return NativeTower(without_mergers(model), grid_of(read_published(self.path))).eval()

    def load_model(self, dtype: torch.dtype) -> Any:
        """Its class with all its weights, the mergers' too, in `dtype`."""
        from models.common.source import directory_of
        from models.loading import load_from_tensors
        from models.published.weights import tensors_of_part

        directory, facts = directory_of(self.path), read_published(self.path)
        return load_from_tensors(
            _tower_class(facts.family),
            facts.config.vision_config,
            tensors_of_part(directory, "vision", "projector"),
            directory,
            dtype=dtype,
        )


class NativeProjector(ProjectorConfig):
    """The mergers of the VLM at `path`: four patches become an image token, also after the tower's inner levels."""

    kind: Literal["published_mergers"] = "published_mergers"
    path: str
    keeps_patches: ClassVar[bool] = False

    def build(self, vision_width: int, language_width: int, find: FindPart = read_part) -> nn.Module:
        """See `ProjectorConfig.build`. Raises InputError where the language model has too few layers for the levels."""
        from models.native.merger import NativeMerger

        del vision_width, language_width
        facts = read_published(self.path, find)
        levels = getattr(facts.config.vision_config, "deepstack_visual_indexes", ())
        if facts.config.text_config.num_hidden_layers <= len(levels):
            raise InputError(
                f"{facts.source}: {len(levels)} levels of features are added after the first layers, which must be"
                f" fewer than the language model's {facts.config.text_config.num_hidden_layers}"
            )
        tower_class = _tower_class(facts.family)
        config = type(facts.config.vision_config)(**{**facts.config.vision_config.to_dict(), "depth": 1})
        return NativeMerger(tower_class(config))

    def shape(
        self, vision_width: int, language_width: int, num_features: int, find: FindPart = read_part
    ) -> ProjectorShape:
        """The matrices, which run once for each block of patches."""
        found = super().shape(vision_width, language_width, num_features, find)
        share = 1 / grid_of(read_published(self.path, find)).merge ** 2
        return ProjectorShape(tuple(Linear(each.name, each.inputs, each.outputs, share) for each in found.linears))


class NativeLanguage(PublishedLanguage):
    """The language model of the VLM at `path`, with tokenizer and chat template."""

    @staticmethod
    def _config(whole: Any) -> Any:
        from models.native.language import language_config

        config = language_config(whole.text_config)
        config.tie_word_embeddings = bool(whole.tie_word_embeddings)
        return config

    def image_token(self) -> str:
        """The placeholder of its processor."""
        return str(open_published_processor(read_published(self.path)).image_token)

    def text_spec(self, tokenizer: Any, max_length: int) -> TextSpec:
        """See `PublishedLanguage.text_spec`; positions are by row and column."""
        found = super().text_spec(tokenizer, max_length)
        return found.model_copy(update={"grid": grid_of(read_published(self.path))})
