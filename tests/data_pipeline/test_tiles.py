"""AnyRes: tiles and token counts are transformers' own, for every size, through encoder and batch."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers import LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from data_pipeline.batch import collate
from data_pipeline.config import ChatmlTemplate
from data_pipeline.encode import Encoder
from data_pipeline.images import open_image
from data_pipeline.index import ShardIndex
from data_pipeline.index_build import build_index
from data_pipeline.mixture import Concatenation
from data_pipeline.sample import Encoded
from data_pipeline.sample_order import OrderIdentity, SampleOrder
from data_pipeline.templates import build_template
from data_pipeline.tiles import fit_tiles
from data_pipeline.tokens import Tokens
from models.common.errors import InputError
from models.spec import AnyResImage, CropImage, ImageSpec, canvas_size, num_image_tokens, unpadded_grid
from tests.support.paths import data, needs_data
from tests.support.shards import text_spec, tiny_tokenizer, write_tar

SQUARES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
GOLDEN = {  # (height, width) -> tokens of LLaVA-NeXT at 336 / 14; the last four differ from LLaVA's own rounding
    (336, 336): 1176,
    (480, 640): 2340,
    (640, 480): 2352,
    (500, 1000): 1752,
    (1000, 500): 1776,
    (1080, 1920): 1948,
    (2000, 300): 1368,
    (88, 55): 984,
    (220, 1056): 1744,
    (352, 748): 1848,
    (861, 328): 2176,
}


def spec(size: int = 336, patch: int = 14, squares: tuple[tuple[int, int], ...] = SQUARES) -> ImageSpec:
    rule = AnyResImage(pinpoints=tuple((down * size, across * size) for down, across in squares))
    return ImageSpec(size=size, patch_size=patch, fit=rule, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def stock(image_spec: ImageSpec) -> LlavaNextImageProcessorPil:
    assert isinstance(image_spec.fit, AnyResImage)
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": image_spec.size},
        crop_size={"height": image_spec.size, "width": image_spec.size},
        image_grid_pinpoints=[list(pinpoint) for pinpoint in image_spec.fit.pinpoints],
    )


def stock_tiles(image_spec: ImageSpec, image: Image.Image) -> NDArray[np.uint8]:
    found = stock(image_spec)(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    return found.transpose(0, 2, 3, 1)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


STOCK_COUNTS = LlavaNextProcessor(
    stock(spec()),
    tiny_tokenizer(),
    patch_size=14,
    vision_feature_select_strategy="default",
    num_additional_image_tokens=1,
)


@pytest.mark.parametrize(("size", "count"), GOLDEN.items())
def test_counts_are_the_golden_ones(size: tuple[int, int], count: int) -> None:
    assert num_image_tokens(spec(), size[1], size[0]) == count


@settings(deadline=None, max_examples=500)
@given(height=st.integers(4, 4000), width=st.integers(4, 4000))
@example(height=4, width=1000)
def test_counts_are_the_stock_processors(height: int, width: int) -> None:
    (stock_count,) = STOCK_COUNTS._get_num_multimodal_tokens([(height, width)])["num_image_tokens"]
    assert num_image_tokens(spec(), width, height) == stock_count


def test_counts_of_other_squares_are_the_stock_processors() -> None:
    """An odd number of patches, and pinpoints that are not symmetric: height and width cannot be mixed up unseen."""
    image_spec = spec(98, 14, ((1, 2), (1, 4), (3, 2), (1, 1)))
    processor = LlavaNextProcessor(
        stock(image_spec), tiny_tokenizer(), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    sizes = [(height, width) for height in range(20, 500, 13) for width in range(20, 500, 17)]
    counts = processor._get_num_multimodal_tokens(sizes)["num_image_tokens"]
    assert [num_image_tokens(image_spec, width, height) for height, width in sizes] == counts


@settings(deadline=None, max_examples=60)
@given(height=st.integers(16, 300), width=st.integers(16, 300), squares=st.permutations([*SQUARES, (1, 1)]))
def test_tiles_are_the_stock_processors(height: int, width: int, squares: list[tuple[int, int]]) -> None:
    image_spec, image = spec(28, 7, tuple(squares[:4])), noise(height, width)
    assert np.array_equal(fit_tiles(image, image_spec), stock_tiles(image_spec, image))


@needs_data
def test_tiles_of_photos_are_the_stock_processors() -> None:
    for path in sorted(data("dali_photos").rglob("*.jp*g"))[:6]:
        image = open_image(path)
        tiles = fit_tiles(image, spec())
        assert np.array_equal(tiles, stock_tiles(spec(), image))
        height, width = canvas_size(spec(), image.width, image.height)
        assert len(tiles) == 1 + height * width // 336**2


def test_the_grid_is_what_unpadding_leaves() -> None:
    import torch
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    for height, width in [*GOLDEN, (333, 1000), (50, 51), (700, 699)]:
        canvas = canvas_size(spec(), width, height)
        features = torch.zeros(1, *(side // 14 for side in canvas))
        assert tuple(unpad_image(features, (height, width)).shape[1:]) == unpadded_grid(spec(), width, height)


def test_one_square_stays_one_tile() -> None:
    image_spec = spec().model_copy(update={"fit": CropImage()})
    assert fit_tiles(noise(40, 60), image_spec).shape == (1, 336, 336, 3)
    assert num_image_tokens(image_spec, 60, 40) == 576


def test_what_fits_no_canvas_is_refused() -> None:
    with pytest.raises(InputError, match="long and thin"):
        fit_tiles(noise(1, 2000), spec())
    with pytest.raises(InputError, match=r"\(336, 500\) is not a multiple"):
        num_image_tokens(spec().model_copy(update={"fit": AnyResImage(pinpoints=((336, 500),))}), 10, 10)


def png(height: int, width: int) -> bytes:
    stream = io.BytesIO()
    noise(height, width).save(stream, "PNG")
    return stream.getvalue()


def test_several_tiles_a_image_go_through_encoder_and_batch(tmp_path: Path) -> None:
    sizes = [(20, 60), (60, 20), (40, 40)]
    two = {"0.png": png(*sizes[0]), "1.png": png(*sizes[1]), "txt": b"two images"}
    two |= {"json": b'{"prompt": "Both?", "text": "two"}'}
    write_tar(
        tmp_path / "a.tar", [("two", two), ("one", {"png": png(*sizes[2]), "txt": b"one"}), ("no", {"txt": b"x"})]
    )
    build_index(tmp_path)
    index, tokenizer, image_spec = ShardIndex.open(tmp_path), tiny_tokenizer(), spec(16, 8)
    tokens = Tokens.of(tokenizer)
    encoder = Encoder(
        [index],
        template=build_template(ChatmlTemplate(), tokens),
        tokens=tokens,
        image=image_spec,
        max_length=512,
    )
    order = SampleOrder([index], Concatenation([index.shard_sizes], 0, 1, 1), OrderIdentity("", 0, 1))
    samples = [encoder(order.resolve(0, n)) for n in range(3)]
    assert all(isinstance(sample, Encoded) for sample in samples)
    batch = collate([(sample,) for sample in samples if isinstance(sample, Encoded)], text_spec(tokenizer))
    assert list(batch.images.sizes) == sizes
    expected = [fit_tiles(noise(*size), image_spec) for size in sizes]
    assert np.array_equal(batch.images.tiles_TSSC.numpy(), np.concatenate(expected))
    assert [len(tiles) for tiles in expected] == [4, 4, 5]
    num_image = int((batch.tokens.input_ids_BL == tokens.image_token_id).sum())
    assert num_image == sum(num_image_tokens(image_spec, width, height) for height, width in sizes)
