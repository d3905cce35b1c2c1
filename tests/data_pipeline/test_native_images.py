"""Images of native resolution in the workers: the stock processor's pixels and tokens, and smaller ones where asked."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.augment import Augmenter
from data_pipeline.config import ChatmlTemplate, ImageAugment, ModelTemplate
from data_pipeline.encode import Encoder, ImageHandling
from data_pipeline.record import Record, Turn
from data_pipeline.templates import build_template
from data_pipeline.tiles import fit_image, fit_to_budget, joined_patches
from data_pipeline.tokens import Tokens
from models.common.errors import InputError
from models.patches import attention_pairs, rope_positions
from models.spec import CLIP_MEAN, CLIP_STD, ImageSpec, NativeImage, PatchGrid
from tests.data_pipeline.test_build import config, folder, open_rank
from tests.support.native import NATIVE, native_processor, real_tokenizer, stock_content
from tests.support.paths import needs_data
from tests.support.samples import ref

__all__ = ["folder"]

SIZES = ((1, 1), (28, 28), (57, 57), (640, 480), (480, 640), (33, 1200), (1200, 33), (999, 501))


def spec(patch: int, merge: int = 2, *, fewest: int = 4, most: int = 64) -> ImageSpec:
    grid = PatchGrid(patch_size=patch, merge=merge)
    fit = NativeImage(grid=grid, min_pixels=fewest * grid.factor**2, max_pixels=most * grid.factor**2)
    return ImageSpec(size=patch, patch_size=patch, fit=fit, mean=CLIP_MEAN, std=CLIP_STD)


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalised(patches: NDArray[np.uint8], image: ImageSpec) -> torch.Tensor:
    """As `VLM.normalise`, with the two equal frames of the processor's rows."""
    pixels = (torch.from_numpy(patches).float() / 255.0 - torch.tensor(image.mean)) / torch.tensor(image.std)
    return pixels.permute(0, 3, 1, 2).unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1)


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_stock_processors_bit_for_bit(size: tuple[int, int], patch: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image, drawn = spec(patch), noise(*size)
    assert image.fit.grid is not None
    bounds = {"shortest_edge": image.fit.min_pixels, "longest_edge": image.fit.max_pixels}
    stock = Qwen2VLImageProcessorPil(patch_size=patch, size=bounds)(drawn, return_tensors="pt")
    found = fit_image(drawn, image)
    assert torch.equal(normalised(found.tiles, image), stock["pixel_values"])
    (rows, columns) = stock["image_grid_thw"][0, 1:].tolist()
    assert (found.size, found.num_tokens) == ((rows * patch, columns * patch), rows * columns // 4)
    (again,) = joined_patches(found.tiles, [found.size], image.fit.grid)
    resized = drawn.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC)
    assert np.array_equal(again, np.asarray(resized))


@pytest.mark.parametrize("budget", [8, 9, 23, 40, 64, 127])
def test_images_get_the_largest_area_that_fits(budget: int) -> None:
    """Each is resized once, as the stock processor would within that bound; one token more and they would not fit."""
    image, images = spec(14), [noise(640, 480), noise(300, 900)]
    fitted, num_shrunk = fit_to_budget(images, image, budget)
    assert sum(each.num_tokens for each in fitted) <= budget
    assert num_shrunk == sum(
        each.size != fit_image(whole, image).size for each, whole in zip(fitted, images, strict=True)
    )
    costs = {}
    for most in range(4, 65):
        smaller = spec(14, most=most)
        same = [fit_image(each, smaller) for each in images]
        costs[most] = sum(each.num_tokens for each in same)
        if [each.size for each in same] == [each.size for each in fitted]:
            assert all(np.array_equal(a.tiles, b.tiles) for a, b in zip(same, fitted, strict=True))
    assert sum(each.num_tokens for each in fitted) == max(cost for cost in costs.values() if cost <= budget)


def test_what_never_fits_stays_as_it_is() -> None:
    image, images = spec(14), [noise(640, 480), noise(300, 900)]
    fitted, num_shrunk = fit_to_budget(images, image, 2)
    assert num_shrunk == 0
    assert [each.size for each in fitted] == [fit_image(each, image).size for each in images]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"too_long": "fewer_tiles"}, "set shrink"),
        ({"jpeg": "scaled"}, "keeps its size: set jpeg: exact"),
        ({"template": ChatmlTemplate()}, "does not have: set kind: model"),
    ],
)
def test_what_knows_squares_alone_is_refused(folder: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        open_rank(config(folder, **changes), image=spec(14))


def test_shrinking_is_for_images_that_have_a_size(folder: Path) -> None:
    with pytest.raises(InputError, match="has its sizes: set skip or error"):
        open_rank(config(folder, too_long="shrink"))


@pytest.fixture(scope="module")
def tokenizer_of_qwen() -> Any:
    return real_tokenizer()


@needs_data
@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize(
    "question",
    [
        "<image>\nWhat is it?",
        "<image>and<image>\n, which?",
        "No picture, héllo 世界",
        "Say <|image_pad|>.",
        "<|vision_start|><|video_pad|><|vision_end|>What happens?",  # no video: text that is spelled so
    ],
)
def test_prompts_are_those_of_the_stock_processor(tokenizer_of_qwen: Any, family: str, question: str) -> None:
    processor = native_processor(family, tokenizer_of_qwen)
    images = [noise(640, 480), noise(60, 200)][: question.count("<image>")]
    token, answer = "<|image_pad|>", "A circle."
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    tokens = Tokens.of(tokenizer, token)
    image = spec(4, fewest=4, most=64)
    encoder = Encoder([], build_template(ModelTemplate(), tokens), tokens, image, 4096, ImageHandling())
    payloads = tuple(png(each) for each in images)
    found = encoder.encode_record(Record(payloads, (Turn("user", question), Turn("assistant", answer))))
    messages = [{"role": "user", "content": stock_content(question, images)}]
    guard = {"sanitize_control_tokens": True} if "_pad|>" in question else {}
    expected = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **guard
    )
    prompt = expected["input_ids"][0].tolist()
    assert found.input_ids[: len(prompt)].tolist() == prompt
    answered = tokenizer.decode(found.input_ids[len(prompt) :])
    assert answered == f"{answer}<|im_end|>"
    assert found.labels[: len(prompt)].tolist() == [-100] * len(prompt)
    if images:
        assert torch.equal(normalised(found.tiles, image), expected["pixel_values"])


def test_what_augmentation_leaves_is_what_the_grid_says() -> None:
    """Pixels, grids and tokens are those of the stock processor for the image as it was cut, mirrored and tinted."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = native_processor("qwen3_vl")
    processor.tokenizer.chat_template = processor.chat_template
    tokens = Tokens.of(processor.tokenizer, "<|image_pad|>")
    image, drawn = spec(4, fewest=4, most=64), [noise(97, 41), noise(30, 120)]
    assert image.fit.grid is not None
    bounds = {"shortest_edge": image.fit.min_pixels, "longest_edge": image.fit.max_pixels}
    stock = Qwen2VLImageProcessorPil(patch_size=4, size=bounds)
    augmenter = Augmenter(ImageAugment(crop_area=(0.2, 0.9), colour=0.2, flip=0.5), 0)
    template = build_template(ModelTemplate(), tokens)
    encoder = Encoder([], template, tokens, image, 4096, ImageHandling(augmenter=augmenter))
    turns = (Turn("user", "<image>and<image>\n, which?"), Turn("assistant", "A circle."))
    record, seen = Record(tuple(png(each) for each in drawn), turns), set()
    for n in range(8):
        found = encoder.encode_record(record, ref(n))
        expected = stock([augmenter(each, ref(n), place) for place, each in enumerate(drawn)], return_tensors="pt")
        grids = expected["image_grid_thw"][:, 1:].tolist()
        assert torch.equal(normalised(found.tiles, image), expected["pixel_values"])
        assert [(height // 4, width // 4) for height, width in found.image_sizes] == [tuple(grid) for grid in grids]
        is_image = found.input_ids == tokens.image_token_id
        assert np.count_nonzero(is_image) == sum(rows * columns for rows, columns in grids) // 4
        assert found.patch_pairs == attention_pairs(image.fit.grid, found.image_sizes)
        rope_positions(is_image, found.image_sizes, image.fit.grid)  # raises where tokens and grid differ
        seen.add(found.image_sizes)
    assert len(seen) > 4, "cuts change the grid"


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
