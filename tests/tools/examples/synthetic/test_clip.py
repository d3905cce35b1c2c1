"""The tiny CLIP on photos: squares as training cuts them, views of them, and one line for what is wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.common.errors import InputError
from tests.support.paths import data, needs_data
from tools.examples.synthetic import clip, photos
from tools.examples.synthetic.__main__ import main

SMALL = ["--size", "32", "--patch", "16", "--steps", "2", "--batch-size", "8"]


@pytest.fixture(autouse=True)
def few_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen photos are enough to test with: eight to learn from, eight to check."""
    for module in (clip, photos):
        monkeypatch.setattr(module, "NUM_CHECKED", 8)


def write_photos(folder: Path, **changes: Any) -> list[str]:
    """Sixteen noisy photos of several shapes and their list; the words of `clip` that name both."""
    noise = np.random.default_rng(0)
    (folder / "images").mkdir()
    entries = []
    for number in range(16):
        pixels = noise.integers(0, 256, (40 + number, 64 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        entries.append({"file_name": f"{number}.png", "caption": f"photo number {number}"} | changes)
    (folder / "captions.json").write_text(json.dumps(entries))
    return ["--captions", str(folder / "captions.json"), "--images", str(folder / "images")]


def test_photos_make_a_tower_that_sees_what_training_shows_it(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, CLIPVisionModel

    words = write_photos(tmp_path)
    assert main(["clip", *words, *SMALL, str(tmp_path / "clip")]) == 0
    tower = CLIPVisionModel.from_pretrained(tmp_path / "clip")
    assert (tower.config.image_size, tower.config.patch_size) == (32, 16)
    size = photos.photo_size(32, 16)
    read = photos.read_photos(tmp_path / "captions.json", tmp_path / "images", size)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "clip")
    images = [Image.open(tmp_path / "images" / f"{number}.png") for number in range(16)]
    stock_NCHW = processor(images, return_tensors="pt")["pixel_values"]
    ours_NCHW = (read.pixels_NCHW.float() / 255 - clip.MEAN[0]) / clip.STD[0]
    torch.testing.assert_close(ours_NCHW, stock_NCHW, atol=1e-5, rtol=0)  # the same bytes, divided in another order
    assert read.captions[3] == ["photo number 3"]


def test_the_same_seed_gives_the_same_tower(tmp_path: Path) -> None:
    words = write_photos(tmp_path)
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        main(["clip", str(tmp_path / name), *words, *SMALL, "--seed", seed])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_a_view_is_a_part_of_its_own_square() -> None:
    """A square that rises from left to right stays within its range, rises or falls, and is never shuffled."""
    ramp_W = torch.arange(0, 192, 4, dtype=torch.uint8)
    squares_BCHW = ramp_W.expand(20, 3, 48, 48).contiguous()
    views_BCHW = photos.random_views(squares_BCHW, random.Random(0))
    assert views_BCHW.shape == squares_BCHW.shape
    assert views_BCHW.dtype == torch.uint8
    mirrored = 0
    for view_CHW in views_BCHW.int():
        steps_W = view_CHW[0, 0].diff()
        assert bool((steps_W >= 0).all()) or bool((steps_W <= 0).all())
        mirrored += int(steps_W.sum() < 0)
        spread = abs(int(steps_W.sum())) / 188
        assert photos.SMALLEST_VIEW - 0.05 < spread <= 1
    assert 0 < mirrored < 20


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "either a world"),
        (["WORLD", "--captions", "c.json", "--images", "i"], "either a world"),
        (["--captions", "c.json"], "both --captions"),
        (["--captions", "c.json", "--images", "i"], "no file c.json"),
        (["--captions", "c.json", "--images", "i", "--size", "40"], "multiple of the patch"),
    ],
)
def test_what_cannot_be_asked_for_is_named(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = [word for word in words if word == "WORLD"]
    with pytest.raises(InputError, match=named):
        main(["clip", *world, "OUT", *words[len(world) :]])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"not json", "no JSON list"),
        (b"[1]", "no JSON list"),
        (b'[{"file_name": "x.jpg"}]', "no JSON list.*caption"),
        (b"[]", "lists 0 photos"),
    ],
)
def test_a_wrong_list_is_named(content: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_bytes(content)
    with pytest.raises(InputError, match=named):
        photos.read_photos(tmp_path / "captions.json", tmp_path, photos.photo_size(32, 16))


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"file_name": "gone.png"}, "gone.png"), ({"caption": "word " * 200}, "shorten 'word word")],
)
def test_a_wrong_photo_or_caption_leaves_nothing_behind(changes: dict[str, str], named: str, tmp_path: Path) -> None:
    words = write_photos(tmp_path, **changes)
    with pytest.raises(InputError, match=named):
        main(["clip", *words, *SMALL, str(tmp_path / "clip")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.json", "images"]


@needs_data
def test_real_photos_are_read(tmp_path: Path) -> None:
    entries = json.loads(data("coco_captions", "captions.json").read_bytes())[:20]
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    read = photos.read_photos(tmp_path / "captions.json", data("coco_captions", "images"), photos.photo_size(96, 16))
    assert read.pixels_NCHW.shape == (20, 3, 96, 96)
    assert float(read.pixels_NCHW.float().std()) > 30
