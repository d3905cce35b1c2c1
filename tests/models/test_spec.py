"""What an image fit says of itself."""

from __future__ import annotations

import pytest

from models.spec import AnyResImage, CropImage, ImageFit, ImageSpec, PadImage, num_image_tokens

MEAN = (0.5, 0.25, 0.999)


@pytest.mark.parametrize(
    ("fit", "padding"),
    [
        (CropImage(), None),
        (PadImage(), (127, 63, 254)),
        (PadImage(colour="black"), (0, 0, 0)),
        (AnyResImage(pinpoints=((28, 56),)), (0, 0, 0)),
    ],
    ids=str,
)
def test_padding_is_the_mean_rounded_down_or_black(fit: ImageFit, padding: tuple[int, int, int] | None) -> None:
    assert fit.padding(MEAN) == padding


def test_only_tiles_depend_on_an_images_size() -> None:
    tiled = AnyResImage(pinpoints=((28, 56), (56, 56), (84, 28)))
    for fit, most in ((CropImage(), 1), (PadImage(), 1), (tiled, 5)):
        assert fit.most_tiles(28) == most
        spec = ImageSpec(size=28, patch_size=7, fit=fit, mean=MEAN, std=MEAN)
        counts = {num_image_tokens(spec, *size) for size in ((100, 100), (300, 100), (100, 300))}
        assert (len(counts) > 1) == fit.is_tiled
    assert num_image_tokens(spec.model_copy(update={"fit": CropImage(), "num_projected_tokens": 5}), 9, 9) == 5
