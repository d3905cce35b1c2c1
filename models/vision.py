"""The vision encoder as a module: pixels -> features of the patches. The kinds are in `models.encoders`.

    pixels_TCHW -> hidden states of one layer -> features_TPV

T tiles, C channels, H height, W width, P image tokens a tile, V the encoder's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.kept_features import KeptFeatures


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


@contextmanager
def _first_layers(model: nn.Module, num_layers: int, total: int) -> Iterator[nn.Module]:
    """Truncate the model to its first layers inside the block, and yield the last of them."""
    places = (
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    )
    parent, name, layers = next(places)
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
