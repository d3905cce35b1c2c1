"""Images that were asked about before: prompts are those of images that are processed, and none is opened again."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_pipeline.limits import ImageError
from eval.engine import Engine
from eval.predictor import Decoding, Predictor, Query, Turn
from eval.prompts import Prompt, encode, encode_answered
from eval.query import ImageFile
from models.opening import open_processor
from tests.support.bundles import image
from tests.support.engines import LIMITS
from tests.support.published import FAMILIES, SIZES, make_published

FIRST, ANSWER, NEXT = Turn("user", "What is it?"), Turn("assistant", "A circle."), Turn("user", "And <image> which?")


def file_of(drawn: Image.Image) -> ImageFile:
    stream = io.BytesIO()
    drawn.save(stream, "PNG")
    return ImageFile(stream.getvalue())


def same(one: Prompt, other: Prompt) -> bool:
    """Whether two prompts are the same input of a model, bit for bit."""
    positions = (one.positions_3L, other.positions_3L)
    return (
        one.ids == other.ids
        and one.pixels.tensors.keys() == other.pixels.tensors.keys()
        and all(torch.equal(values, other.pixels.tensors[name]) for name, values in one.pixels.tensors.items())
        and (positions == (None, None) or torch.equal(*positions))  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 3])
def test_a_prompt_with_known_pixels_is_that_of_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, count: int
) -> None:
    """In another turn of another text, in which placeholders stand elsewhere."""
    processor = open_processor(make_published(tmp_path, family))
    images = tuple(image("circle", size) for size in SIZES[:count])
    files = tuple(map(file_of, images))
    known = encode(processor, Query(files, (FIRST,))).pixels
    assert len(known.digests) == count
    assert known.num_bytes >= sum(tensor.nbytes for tensor in known.tensors.values())
    expected = [encode(processor, Query(images, turns)) for turns in ((FIRST,), (FIRST, ANSWER, NEXT), (NEXT,))]

    def refuse(_: ImageFile) -> Image.Image:
        raise AssertionError("it was opened again")

    monkeypatch.setattr(ImageFile, "open", refuse)
    for prompt, turns in zip(expected, ((FIRST,), (FIRST, ANSWER, NEXT), (NEXT,)), strict=True):
        found = encode(processor, Query(files, turns), known)
        assert same(found, prompt)
        assert found.pixels is known, "and their digests are not computed again"


def test_files_are_what_images_are(tmp_path: Path) -> None:
    """Where an answer is given too, and nothing is kept."""
    processor = open_processor(make_published(tmp_path, "llava"))
    drawn = image("circle", SIZES[1])
    one, other = (
        encode_answered(processor, Query((each,), (FIRST,)), "A.", frozenset({1})) for each in (drawn, file_of(drawn))
    )
    assert one[1] == other[1]
    assert same(one[0], other[0])


def test_an_engine_decodes_what_it_was_asked_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single images and several; another order of the same files is another chat."""
    predictor = Predictor.open(make_published(tmp_path, "llava"), device="cpu")
    circle, square = (file_of(image(shape)) for shape in ("circle", "square"))
    opened: list[bytes] = []
    really = ImageFile.open
    monkeypatch.setattr(ImageFile, "open", lambda file: (opened.append(file.content), really(file))[1])
    engine, decoding = Engine(predictor, LIMITS).start(), Decoding(max_new_tokens=4)
    try:
        for files in ((circle,), (square,), (circle, square), (square, circle), (circle,), (circle, square)):
            query = Query(tuple(ImageFile(file.content) for file in files), (FIRST,))
            pixels = engine.find_pixels(query)
            again = engine.prepare(query, decoding, pixels)
            drawn = tuple(really(file) for file in files)
            assert same(again, engine.prepare(Query(drawn, (FIRST,)), decoding))
        stats = engine.stats()
        assert opened == [file.content for file in (circle, square, circle, square, square, circle)]
        assert (stats.pixels.num_queries, stats.pixels.num_hits) == (6, 2)
        assert 0 < stats.pixels.num_bytes <= stats.kept_bytes
        assert engine.find_pixels(Query((), (FIRST,))) is None
        assert engine.find_pixels(Query((circle, really(square)), (FIRST,))) is None
    finally:
        engine.close()
    assert engine.stats().kept_bytes == 0


def test_an_image_that_cannot_be_decoded_is_not_kept(tmp_path: Path) -> None:
    predictor = Predictor.open(make_published(tmp_path, "llava"), device="cpu")
    engine = Engine(predictor, replace(LIMITS, pixel_bytes=100)).start()
    try:
        damaged = Query((ImageFile(file_of(image("circle")).content[:-200]),), (FIRST,))
        for _ in range(2):
            with pytest.raises(ImageError):
                engine.prepare(damaged, Decoding(), engine.find_pixels(damaged))
        large = Query((file_of(image("circle")),), (FIRST,))
        engine.prepare(large, Decoding(), engine.find_pixels(large))
        assert engine.find_pixels(large) is None, "it is larger than all that may be kept"
        assert engine.stats().pixels.num_bytes == 0
    finally:
        engine.close()


def test_a_file_that_is_gone_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png can be read \(No such file"):
        ImageFile.read(tmp_path / "gone.png")
