"""The vision encoder as a module: pixels -> features of the patches. The kinds are in `models.encoders`.

    pixels_TCHW -> hidden states of one layer -> features_TPV

T tiles, C channels, H height, W width, P image tokens a tile, V the encoder's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.anyres import arrangement, real_tiles, shrink
from models.kept_features import KeptFeatures
from models.patch_plan import PatchPlan
from models.spec import ImageSizes, ImageSpec


class ImageFeatures(NamedTuple):
    """Projected features in the order of the image tokens; I image tokens, D the language model's width."""

    joined_ID: Tensor
    deep: tuple[Tensor, ...] = ()
    """What is added after the decoder's first layers, each [I, D]."""


class VisionEncoder(nn.Module):
    """A transformers vision model, of which the hidden states after one layer are the features.

    Layers after that one are not run. A frozen encoder runs without an autograd graph, in its own dtype.
    """

    def __init__(self, model: Any, *, feature_layer: int, num_skipped_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.feature_layer = feature_layer
        self.num_skipped_tokens = num_skipped_tokens
        self._kept: KeptFeatures | None = None
        self._kept_dtype = torch.float32

    def keep_features(self, directory: Path, limit_gb: float) -> None:
        """Read features from a directory from now on, and keep there what has to be computed.

        Call it once the encoder has its weights, is frozen and is on its device. Raises InputError where the directory
        cannot be written.
        """
        # In another dtype, which the probe of `trainer.engine.numerics` gives it for a moment, it computes.
        self._kept_dtype = self.dtype
        facts = (self.feature_layer, self.num_skipped_tokens)
        self._kept = KeptFeatures.open(directory, limit_gb, self.model, *facts)

    @property
    def width(self) -> int:
        """V, the width of a feature."""
        return int(self.model.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the encoder computes in."""
        return next(self.model.parameters()).dtype

    def image_features(
        self,
        projector: Any,
        pixels_TCHW: Tensor,
        sizes: ImageSizes,
        *,
        spec: ImageSpec,
        plan: PatchPlan | None = None,
    ) -> ImageFeatures:
        """Projected features of normalised pixels, in the order of the image tokens; none without images.

        Without images one blank tile is run, so that every rank takes part in the same collectives and every weight has
        a gradient (of 0). Raises ValueError where images of these sizes do not have so many tiles.
        """
        del plan  # of patches
        is_blank = pixels_TCHW.shape[0] == 0
        if is_blank:
            pixels_TCHW = pixels_TCHW.new_zeros(1, 3, spec.size, spec.size)
        features_FD: Tensor = projector(self(pixels_TCHW)).flatten(0, 1)
        if spec.fit.is_tiled:
            num_features, features_FD = len(features_FD), projector.newline(features_FD)
            order_I = arrangement(spec, sizes)
            if not is_blank and (not len(order_I) or int(order_I.max()) != num_features):
                raise ValueError(f"images of the sizes {list(sizes)} do not have {len(pixels_TCHW)} tiles")
            features_FD = features_FD.index_select(0, order_I.to(features_FD.device, non_blocking=True))
            features_FD = features_FD if is_blank else shrink(spec, features_FD, sizes)
        return ImageFeatures(features_FD[:0] if is_blank else features_FD)

    def without_weights(self) -> VisionEncoder:
        """A module of the same kind with weights at random, for a caller who fills them."""
        return VisionEncoder(
            type(self.model)(self.model.config),
            feature_layer=self.feature_layer,
            num_skipped_tokens=self.num_skipped_tokens,
        ).eval()

    @staticmethod
    def from_processor(
        pixel_values: Tensor, sizes: Tensor | None, spec: ImageSpec
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """Tiles and (height, width) of each image, of a processor's output: see `VLM.respond`."""
        return real_tiles(spec, pixel_values, sizes)

    @staticmethod
    def processor_pixels(pixels_TCHW: Tensor) -> Tensor:
        """Normalised pixels in the order in which a processor of transformers gives them."""
        return pixels_TCHW

    def probe(self, spec: ImageSpec) -> Tensor:
        """A sum that depends on every weight that features depend on."""
        device = next(self.parameters()).device
        return self(torch.zeros(1, 3, spec.size, spec.size, device=device)).sum()

    def forward(self, pixels_TCHW: Tensor) -> Tensor:
        """Features [T, P, V] of normalised pixels."""
        pixels_TCHW = pixels_TCHW.to(self.dtype)
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            return self._features(pixels_TCHW)
        with torch.no_grad(), torch.autocast(pixels_TCHW.device.type, enabled=False):
            if self._kept is not None and self.dtype == self._kept_dtype:
                return self._kept.features(pixels_TCHW, self._features)
            return self._features(pixels_TCHW)

    def _features(self, pixels_TCHW: Tensor) -> Tensor:
        return self._states(pixels_TCHW)[:, self.num_skipped_tokens :]

    def _states(self, pixels_TCHW: Tensor) -> Tensor:
        """The hidden states [T, tokens, V] after layer `feature_layer`, counted as `hidden_states` of transformers."""
        total = int(self.model.config.num_hidden_layers)
        num_layers = self.feature_layer % (total + 1)
        if num_layers in (0, total):  # the embedding; or the end, which some families still norm
            states: Tensor = self.model(pixels_TCHW, output_hidden_states=True).hidden_states[num_layers]
            return states
        with _first_layers(self.model, num_layers, total) as last:
            return _output_of(last, lambda: self.model(pixels_TCHW))


def layers_within(model: nn.Module, total: int) -> tuple[nn.Module, str, nn.ModuleList]:
    """(parent, name in it, layers): where a model keeps its `total` layers."""
    return next(
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    )


@contextmanager
def _first_layers(model: nn.Module, num_layers: int, total: int) -> Iterator[nn.Module]:
    """Truncate the model to its first layers inside the block, and yield the last of them."""
    parent, name, layers = layers_within(model, total)
    parent._modules[name] = layers[:num_layers]
    try:
        yield layers[num_layers - 1]
    finally:
        parent._modules[name] = layers


def _output_of(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """The output of `module` during `run`."""
    found: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda _module, _inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        run()
    finally:
        handle.remove()
    (states,) = found
    return states
