"""One set of limits: what training refuses, evaluation, the library and the page refuse too, before memory is taken."""

from __future__ import annotations

import io
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import limits
from data_pipeline.images import check_header, fit, open_image
from data_pipeline.limits import ImageError, Memory
from models.common.errors import InputError
from models.spec import ImageSpec, PadImage


def png(width: int, height: int, mode: str = "1") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, "PNG")
    return stream.getvalue()


def through_the_page(folder: Path, payload: bytes) -> None:
    from tools.serve.images import check_image

    (folder / "upload").write_bytes(payload)
    check_image(folder / "upload")


def through_evaluation(folder: Path, payload: bytes) -> None:
    from eval.images import shown_images

    (folder / "a.png").write_bytes(payload)
    shown_images(folder, [("a", None)], seed=None)


WAYS: dict[str, Callable[[Path, bytes], object]] = {
    "training": lambda _folder, payload: open_image(payload),
    "evaluation": through_evaluation,
    "page": through_the_page,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (png(100_000, 1), "too long and thin"),
        (png(1, 100_000), "too long and thin"),
        (png(10_001, 10_000), "more than 100000000 are refused"),
        (png(30_000, 30_000), "has 900000000 pixels; more than 100000000 are refused"),
    ],
    ids=["wide", "tall", "large", "larger"],
)
def test_every_way_in_has_the_same_limits(way: str, payload: bytes, message: str, tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            WAYS[way](tmp_path, payload)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_an_image_object_is_refused_by_the_library_too() -> None:
    from eval.predictor import Query, Turn
    from eval.prompts import encode

    class Processor:
        image_token = "<image>"
        image_processor = type("Padding", (), {"do_pad": True})()
        tokenizer = type("Tokenizer", (), {"all_special_tokens": []})()

    for size in ((40_000, 1), (1, 201)):
        with pytest.raises(ImageError, match="too long and thin"):
            encode(Processor(), Query((Image.new("1", size),), (Turn("user", "What?"),)))


def test_a_file_beyond_the_bytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as stream:
        stream.truncate(limits.MAX_BYTES + 1)
    for source in (tmp_path / "a.png", bytes(limits.MAX_BYTES + 1)):
        with pytest.raises(ImageError, match="more than 50 MB are refused"):
            check_header(source)


def test_memory_is_shared_and_one_that_asks_for_more_than_all_goes_alone() -> None:
    memory, most, now, lock = Memory(10), [0], [0], threading.Lock()

    def work(num_bytes: int) -> None:
        with memory.taken(num_bytes):
            with lock:
                now[0] += num_bytes
                most[0] = max(most[0], now[0])
            time.sleep(0.002)
            with lock:
                now[0] -= num_bytes

    threads = [threading.Thread(target=work, args=(size,)) for size in (4, 4, 4, 6, 6, 10, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] <= 10
    with memory.taken(1000), pytest.raises(ZeroDivisionError), memory.taken(0):
        raise ZeroDivisionError
    with memory.taken(10):
        pass


def test_deep_grey_in_strips_is_what_it_is_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (37, 21), dtype=np.uint16)
    deep = {
        "I;16": Image.fromarray(values),
        "I": Image.fromarray(values.astype(np.int32)),
        "F": Image.fromarray((values / 65535).astype(np.float32)),
    }
    for image in deep.values():
        stream = io.BytesIO()
        image.save(stream, "TIFF")
        whole = open_image(stream.getvalue()).tobytes()
        monkeypatch.setattr("data_pipeline.colours._STRIP_PIXELS", 50)
        assert open_image(stream.getvalue()).tobytes() == whole
        monkeypatch.undo()


@pytest.mark.parametrize("size", [(37, 21), (5, 61), (90, 2)])
def test_transparency_and_padding_in_strips_are_what_they_are_at_once(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    spec = ImageSpec(size=16, patch_size=8, fit=PadImage(), mean=(0.1, 0.5, 0.9), std=(0.5, 0.5, 0.5))
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    image = open_image(stream.getvalue())
    square = Image.new("RGB", (max(size), max(size)), spec.fit.padding(spec.mean))
    square.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    expected = np.asarray(square.resize((16, 16), Image.Resampling.BICUBIC))
    monkeypatch.setattr("data_pipeline.colours._STRIP_PIXELS", 100)
    monkeypatch.setattr("data_pipeline.images._STRIP_PIXELS", 200)
    assert open_image(stream.getvalue()).tobytes() == image.tobytes()
    assert np.array_equal(fit(image, spec), expected)


def test_a_decoder_that_takes_more_than_all_is_refused_from_the_header() -> None:
    stream = io.BytesIO()
    Image.new("L", (7_100, 7_100)).convert("RGB").save(stream, "WEBP", method=0)
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=r"7100 x 7100 pixels, to decode which as WEBP takes 1\.0 GB"):
            check_header(stream.getvalue())
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_turns_text_has_a_longest_length() -> None:
    assert not limits.text_problem("a" * limits.MAX_CHARACTERS)
    assert (
        limits.text_problem("a" * (limits.MAX_CHARACTERS + 1)) == "has 500001 characters; more than 500000 are refused"
    )


def test_a_large_deep_image_takes_no_more_than_was_reserved_for_it() -> None:
    payload = png(3000, 3000, "I;16")
    tracemalloc.start()
    try:
        open_image(payload)
        assert tracemalloc.get_traced_memory()[1] < 8 * 9_000_000
    finally:
        tracemalloc.stop()
