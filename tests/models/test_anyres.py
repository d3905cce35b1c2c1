"""AnyRes in the model: features stand where transformers' LLaVA-NeXT puts them, for a sweep of sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.anyres import arrangement, real_tiles, with_newline
from models.projectors.linear import LinearProjector
from models.spec import AnyResImage, CropImage, ImageSpec, num_image_tokens

SIZE, PATCH, WIDTH = 28, 7, 6
SQUARES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
SPEC = ImageSpec(
    size=SIZE,
    patch_size=PATCH,
    fit=AnyResImage(pinpoints=tuple((down * SIZE, across * SIZE) for down, across in SQUARES)),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


@pytest.fixture(scope="module")
def stock() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    shape = {"hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    assert isinstance(SPEC.fit, AnyResImage)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=SIZE, patch_size=PATCH),
        text_config=LlamaConfig(**shape, vocab_size=8),
        image_grid_pinpoints=[list(pinpoint) for pinpoint in SPEC.fit.pinpoints],
    )
    return LlavaNextModel(config)


def test_features_stand_where_llava_next_puts_them(stock: nn.Module) -> None:
    sizes = [(height, width) for height in range(9, 200, 23) for width in range(9, 200, 29)]
    sizes += [(28, 28), (56, 56), (88, 55), (220, 1056), (352, 748), (861, 328)]
    counts = [len(real_tiles(SPEC, torch.zeros(1, 9, 1), torch.tensor([size]))[0]) for size in sizes]
    features = torch.randn(sum(counts), (SIZE // PATCH) ** 2, WIDTH)
    newline = stock.image_newline.detach()
    packed, lengths = stock.pack_image_features(
        features.split(counts), torch.tensor(sizes), "default", image_newline=newline
    )
    ours = torch.cat([features.flatten(0, 1), newline[None]])[arrangement(SPEC, sizes)]
    assert torch.equal(ours, torch.cat(packed))
    assert lengths.tolist() == [num_image_tokens(SPEC, width, height) for height, width in sizes]


def test_only_anyres_has_a_newline() -> None:
    projector = with_newline(LinearProjector().build(4, WIDTH), CropImage(), WIDTH)
    assert not hasattr(projector, "newline")
    projector = with_newline(projector, SPEC.fit, WIDTH)
    assert dict(projector.named_parameters())["newline.weight"].shape == (WIDTH,)
