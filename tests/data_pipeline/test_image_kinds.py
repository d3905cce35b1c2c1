"""An image is known by its content; one that nobody reads is named, never dropped."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.image_kinds import extension_for, image_kind
from data_pipeline.images import ImageError, has_heic, open_image
from data_pipeline.index import QUARANTINE_FILE, ShardIndex
from data_pipeline.index_build import build_index
from data_pipeline.record import RecordError, read_record
from data_pipeline.unused import remarks, unread_members
from models.common.errors import InputError, run_cli
from models.spec import IMAGE_TOKEN
from tests.support.shards import image_bytes, write_tar
from tools.shards.__main__ import main

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000"])
def test_kinds_are_told_by_content(name: str) -> None:
    payload = image_bytes(file_format=name)
    assert image_kind(payload[:32]) == {"JPEG2000": "jp2"}.get(name, name.lower())
    assert Image.open(io.BytesIO(payload)).format == name


@pytest.mark.parametrize("text", [b"", b"BMW is a car", b"GIF", b"{}", b"MM", b"A cat."])
def test_text_is_no_image(text: bytes) -> None:
    assert image_kind(text) is None


def test_an_ending_that_fits_stays() -> None:
    jpeg = image_bytes(file_format="JPEG")
    assert [extension_for(jpeg, name) for name in ("jpeg", "jfif", "png", "", "part")] == [
        "jpeg",
        "jfif",
        "jpg",
        "jpg",
        "jpg",
    ]


@pytest.mark.parametrize("extension", ["jfif", "jpe", "img", "0.jfif"])
def test_jpegs_of_any_ending_are_read(extension: str) -> None:
    jpeg = image_bytes(file_format="JPEG")
    assert read_record({extension: jpeg, "txt": b"A cat."}).images == (jpeg,)


def test_an_image_without_any_tag_stands_in_front() -> None:
    chat = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    record = read_record({"png": image_bytes(), "json": json.dumps({"conversations": chat}).encode()})
    assert record.turns[0].text == f"{IMAGE_TOKEN}\nWhat?"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"left.jpg": image_bytes(), "right.jpg": image_bytes()}, r"left.jpg, right.jpg: images that nobody reads"),
        ({"photo.dat": image_bytes()}, "images that nobody reads"),
        ({"svg": b"<svg>"}, "svg: it is SVG, a drawing without pixels: render it to PNG"),
        ({"ico": b"\0\0\1\0" + bytes(40), "txt": b"a"}, "ico: it is an icon of several sizes"),
        ({"jpg": b"\xff\x0a" + bytes(40)}, "JPEG XL"),
        ({"jpg.gz": b"\x1f\x8b" + bytes(40)}, "jpg.gz: images that nobody reads"),
    ],
)
def test_a_sample_is_no_text_because_its_images_have_other_names(files: dict[str, bytes], reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        read_record({**files, "txt": b"A cat."})


def test_a_mask_beside_an_image_is_left_aside() -> None:
    assert len(read_record({"jpg": image_bytes(), "seg.png": image_bytes(), "txt": b"a"}).images) == 1


@pytest.mark.skipif(has_heic(), reason="pillow-heif is installed here")
def test_heic_says_what_it_is_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(HEIC)
    for source in (HEIC, tmp_path / "photo.jpg"):
        with pytest.raises(ImageError, match="is HEIC, as phones write it: `pip install pillow-heif`"):
            open_image(source)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "it is empty"),
        (b"<html>", "a page of HTML"),
        (b"\x89PNG\r\n\x1a\n", "."),
        (b"hello", "begins with b'hello'"),
    ],
)
def test_what_is_no_image_is_described(payload: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as raised:
        open_image(payload)
    assert "BytesIO" not in str(raised.value)


def test_a_set_whose_images_nobody_reads_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [(f"{n}", {"left.jpg": image_bytes(n), "right.jpg": image_bytes(n), "txt": b"a"}) for n in range(4)]
    write_tar(tmp_path / "a.tar", samples)
    assert run_cli(main, ["index", str(tmp_path), "--quiet", "--jobs", "1"]) == 2
    assert "images that nobody reads" in capsys.readouterr().err
    assert len((tmp_path / QUARANTINE_FILE).read_text().split()) > 4


def test_members_that_no_sample_uses_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [
        (f"{n}", {"jfif": image_bytes(n, file_format="JPEG"), "seg.png": image_bytes(n), "cls": b"3", "txt": b"a"})
        for n in range(3)
    ]
    write_tar(tmp_path / "a.tar", samples)
    for command in ("index", "check"):
        assert run_cli(main, [command, str(tmp_path), "--quiet", "--jobs", "1"]) == 0
        assert "members that no sample uses: 3 .cls, 3 .seg.png" in capsys.readouterr().err
    assert unread_members(ShardIndex.open(tmp_path)) == {"cls": 3, "seg.png": 3}


def test_a_tar_that_the_index_does_not_list_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1", {"txt": b"a"})])
    build_index(tmp_path)
    index = ShardIndex.open(tmp_path)
    assert remarks(index) == []
    write_tar(tmp_path / "b.tar", [("2", {"txt": b"a"})])
    (remark,) = remarks(index)
    assert "does not list b.tar (1 tars)" in remark


def test_members_sorted_by_ending_are_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for ending in ("png", "txt"):
            for number in range(3):
                payload = image_bytes(number) if ending == "png" else f"caption {number}".encode()
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(payload)
                archive.addfile(info, io.BytesIO(payload))
    build_index(tmp_path)
    index = ShardIndex.open(tmp_path)
    for number in range(3):
        assert index.read(number) == {"png": image_bytes(number), "txt": f"caption {number}".encode()}


def test_keys_with_dots_are_named_with_the_reason(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"photo.{n:03d}", {"png": image_bytes(n), "txt": b"a"}) for n in range(3)])
    with pytest.raises(InputError, match=r"are one sample, since a key ends at the first dot; name them photo_000.txt"):
        build_index(tmp_path)
