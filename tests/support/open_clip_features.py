"""Compares the features of our encoder with open_clip's own: `python -m tests.support.with_open_clip` runs it.

WORDS: architecture.json, weights file. Prints the largest difference of every layer's hidden states, as JSON.
"""

from __future__ import annotations

import json
import sys

import torch

from models.encoders.open_clip import OpenClipVision, original

if __name__ == "__main__":
    architecture, weights = sys.argv[1:]
    torch.manual_seed(0)
    theirs, differences = original(OpenClipVision(architecture=architecture, weights=weights)).visual, []
    size, num_layers = theirs.image_size[0], len(theirs.transformer.resblocks)
    pixels = torch.randn(3, 3, size, size)
    states: list[torch.Tensor] = []
    for block in theirs.transformer.resblocks:
        block.register_forward_hook(lambda _block, _inputs, output: states.append(output))
    with torch.no_grad():
        theirs(pixels)
        for layer in range(1, num_layers + 1):
            config = OpenClipVision(architecture=architecture, weights=weights, feature_layer=layer)
            ours = config.load(torch.float32)(pixels)
            differences.append(float((ours - states[layer - 1][:, 1:]).abs().max() / states[layer - 1].abs().max()))
    print(json.dumps(differences))
