"""Images come out as stock image processors make them, and every kind of file comes out upright and RGB."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from data_pipeline.images import fit, open_image
from data_pipeline.limits import MAX_PIXELS, ImageError
from models.spec import CLIP_MEAN, CLIP_STD, CropImage, ImageSpec, PadImage
from tests.support.paths import data, needs_data

SIZES = [(20, 20), (37, 24), (24, 37), (101, 33), (500, 31), (8, 8), (640, 480), (335, 336), (500, 333), (480, 640)]


def spec(rule: CropImage | PadImage, size: int = 32) -> ImageSpec:
    return ImageSpec(size=size, patch_size=8, fit=rule, mean=CLIP_MEAN, std=CLIP_STD)


def stock(rule: CropImage | PadImage, size: int) -> CLIPImageProcessorPil | LlavaImageProcessorPil:
    values = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    values |= {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
    if isinstance(rule, CropImage):
        return CLIPImageProcessorPil(**values)
    return LlavaImageProcessorPil(**values, do_pad=True)


def assert_equal_to_stock(image: Image.Image, rule: CropImage | PadImage, size: int) -> None:
    ours = fit(image, spec(rule, size))
    assert ours.shape == (size, size, 3)
    raw = stock(rule, size)(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(raw.transpose(1, 2, 0), ours)
    theirs = stock(rule, size)(image, return_tensors="np")["pixel_values"][0]
    normalised = (ours / np.float32(255) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    # two roundings of a float32 of magnitude up to 2.7
    np.testing.assert_allclose(normalised.transpose(2, 0, 1), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", [CropImage(), PadImage()], ids=["crop", "pad"])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_stock_processor(rule: CropImage | PadImage, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    assert_equal_to_stock(Image.fromarray(pixels), rule, 32)


@needs_data
@pytest.mark.parametrize("rule", [CropImage(), PadImage()], ids=["crop", "pad"])
def test_equals_the_stock_processor_on_photos(rule: CropImage | PadImage) -> None:
    paths = sorted(data("dali_photos").rglob("*.jp*g"))[:20]
    assert paths
    for path in paths:
        assert_equal_to_stock(open_image(path), rule, 336)


@settings(deadline=None, max_examples=60)
@given(width=st.integers(1, 400), height=st.integers(1, 400), size=st.sampled_from([16, 31, 64]))
@example(width=2, height=201, size=16)  # so long and thin that Pillow chooses another order of its two passes
@example(width=3, height=300, size=16)
def test_not_computing_what_is_cut_off_changes_no_bit(width: int, height: int, size: int) -> None:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    long = int(size * max(width, height) / min(width, height))
    resized = image.resize((size, long) if width <= height else (long, size), Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in resized.size)
    expected = np.asarray(resized)[top : top + size, left : left + size]
    assert np.array_equal(fit(image, spec(CropImage(), size)), expected)


def scaled_difference(path: Path, size: int) -> float:
    exact, scaled = open_image(path), open_image(path, at_least=size)
    assert min(scaled.size) >= min(size, *exact.size)
    apart = fit(scaled, spec(CropImage(), size)).astype(int) - fit(exact, spec(CropImage(), size))
    return float(np.abs(apart).mean())


@needs_data
def test_scaled_decoding_changes_pixels_little() -> None:
    """Mean difference over photographs at twice the encoder's size and more; docs/data.md states the single ones."""
    paths = sorted(data("dali_photos").rglob("*.jp*g"))[:20]
    assert np.median([scaled_difference(path, 128) for path in paths]) < 2
    assert scaled_difference(data("bad_inputs", "exif_orientation", "Portrait_1.jpg"), 336) == pytest.approx(
        0.4, abs=0.1
    )
    assert scaled_difference(data("instruct", "llava_waterview.jpg"), 224) == pytest.approx(3.1, abs=0.1)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def test_alpha_is_laid_over_white() -> None:
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert open_image(encoded(half, "PNG")).getpixel((0, 0)) == (127, 127, 127)
    clear = Image.new("P", (4, 4), 0)
    assert open_image(encoded(clear, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_upper_bits() -> None:
    deep = Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16))
    assert open_image(encoded(deep, "PNG")).getpixel((0, 0)) == (128, 128, 128)
    assert open_image(encoded(deep, "TIFF")).getpixel((0, 0)) == (128, 128, 128)


def test_floating_point_is_read_as_zero_to_one() -> None:
    values = Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32))
    assert open_image(encoded(values, "TIFF")).getpixel((0, 0)) == (127, 127, 127)


def test_cmyk_and_grey_become_rgb() -> None:
    for mode in ("CMYK", "L"):
        image = open_image(encoded(Image.new(mode, (4, 4)), "JPEG"))
        assert image.mode == "RGB"


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(animation).getpixel((0, 0)) == (255, 0, 0)


def test_orientation_is_applied() -> None:
    image = Image.new("RGB", (8, 4), "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(image, "JPEG", exif=exif)).size == (4, 8)


@needs_data
def test_all_orientations_of_a_photo_are_the_same_image() -> None:
    folder = data("bad_inputs", "exif_orientation")
    upright = np.asarray(open_image(folder / "Portrait_1.jpg").resize((45, 60))).astype(int)
    for number in range(2, 9):
        turned = np.asarray(open_image(folder / f"Portrait_{number}.jpg").resize((45, 60))).astype(int)
        assert np.abs(turned - upright).mean() < 12  # each file was compressed on its own


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    small = encoded(Image.new("L", (1, 1)), "PNG")
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + small[24:29]
    bomb = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    with pytest.raises(ImageError, match="900000000 pixels"):
        open_image(bomb)


def test_an_image_too_long_and_thin_is_refused() -> None:
    narrow = Image.new("RGB", (MAX_PIXELS // 100, 1))
    for rule in (CropImage(), PadImage()):
        with pytest.raises(ImageError, match="long and thin"):
            fit(narrow, spec(rule, 336))
