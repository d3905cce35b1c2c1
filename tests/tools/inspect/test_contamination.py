"""Pictures of a benchmark in shards: as they are, in other sizes and formats, and others that are not meant."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.index_build import build_index
from models.common.errors import InputError
from tests.support.benchmarks import TinyBenchmark, make_benchmark
from tests.support.shards import caption_sample, write_tar
from tools.inspect.contamination import looks_of, main


def scene(seed: int) -> Image.Image:
    """Smooth blots, as photographs have them."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return small.resize((320, 240), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, file_format: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format)
    return stream.getvalue()


@pytest.fixture
def tiny(tmp_path: Path) -> TinyBenchmark:
    made = make_benchmark(tmp_path)
    for number, path in enumerate(sorted(made.images.iterdir())):
        path.write_bytes(encoded(scene(number), "PNG"))
    return made


def shards(folder: Path, images: list[bytes]) -> Path:
    folder.mkdir()
    samples = [(f"{n:03d}", {**caption_sample(n, image=False), "jpg": content}) for n, content in enumerate(images)]
    write_tar(folder / "a.tar", samples)
    build_index(folder)
    return folder


def suite(tiny: TinyBenchmark) -> Path:
    task = {"kind": "vqa", "questions": tiny.questions, "annotations": tiny.annotations, "images": tiny.images}
    path = tiny.folder / "suite.yaml"
    path.write_text(json.dumps([task], default=str))
    return path


def test_equal_files_and_pictures_that_look_alike_are_named(
    tiny: TinyBenchmark, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted(tiny.images.iterdir())
    same = paths[0].read_bytes()
    smaller = encoded(scene(1).resize((200, 150)), "JPEG")
    found = shards(tiny.folder / "set", [encoded(scene(50), "JPEG"), same, smaller, encoded(scene(51), "JPEG")])
    out = tiny.folder / "found.json"
    assert main([str(suite(tiny)), "--shards", str(found), "--out", str(out)]) == 0
    assert "vqa: of 3 pictures 1 are in the shards as they are, 1 look alike" in capsys.readouterr().out
    equal, alike = json.loads(out.read_text())["matches"]
    assert (equal["picture"], equal["key"], equal["distance"]) == (str(paths[0]), "001", None)
    assert (alike["picture"], alike["key"]) == (str(paths[1]), "002")
    assert alike["distance"] <= 4


def test_other_pictures_are_far_apart_and_plain_ones_tell_nothing() -> None:
    bits = [looks_of(encoded(scene(seed), "PNG")).bits for seed in range(40)]
    assert all(each is not None for each in bits)
    distances = [(one or 0) ^ (other or 0) for place, one in enumerate(bits) for other in bits[:place]]
    assert min(each.bit_count() for each in distances) > 8
    assert looks_of(encoded(Image.new("RGB", (64, 64), "red"), "PNG")).bits is None


def test_a_task_without_pictures_to_compare_is_one_line(tiny: TinyBenchmark) -> None:
    data = {"kind": "captions", "captions": tiny.captions, "images": tiny.images, "prompt": "?"}
    path = tiny.folder / "suite.yaml"
    path.write_text(json.dumps([{"kind": "image_gain", "data": data}], default=str))
    with pytest.raises(InputError, match="image_gain: its pictures are not compared"):
        main([str(path), "--shards", str(tiny.folder)])
