"""Finding images, and exchanging them."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.images import find_images, shuffle_images
from models.common.errors import InputError


def folder_of(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def test_finds_by_file_name_name_stem_and_number(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path, "COCO_val2014_000000262148.jpg", "003a8ae2ef43b901.JPG", "VizWiz_val_00000003.png", "7.txt"
    )
    wanted = [
        (262148, None),
        ("003a8ae2ef43b901", None),
        ("VizWiz_val_00000003.png", None),
        (9, "VizWiz_val_00000003.png"),
    ]
    names = [path.name for path in find_images(folder, wanted)]
    assert names == [
        "COCO_val2014_000000262148.jpg",
        "003a8ae2ef43b901.JPG",
        "VizWiz_val_00000003.png",
        "VizWiz_val_00000003.png",
    ]


def test_names_what_is_missing_or_ambiguous(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a_01.jpg", "b_1.jpg", "7.txt")
    with pytest.raises(InputError, match="lacks 2 of 2 images, the first is of image 7"):
        find_images(folder, [(7, None), (8, None)])
    with pytest.raises(InputError, match=r"both a_01.jpg and b_1.jpg may be image 1"):
        find_images(folder, [(1, None)])
    with pytest.raises(InputError, match=r"the first is c.jpg"):
        find_images(folder, [(1, "c.jpg")])
    with pytest.raises(InputError, match="no such folder of images"):
        find_images(folder / "nowhere", [(1, None)])


def test_exchange_is_a_seeded_derangement_of_images(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, *(f"{number}.jpg" for number in range(40)))
    images = [folder / f"{number % 40}.jpg" for number in range(100)]
    shown = shuffle_images(images, seed=1)
    assert all(own != other for own, other in zip(images, shown, strict=True))
    assert sorted(shown[:40]) == sorted(images[:40])
    assert shown[:20] == shown[40:60] == shown[80:]
    assert shown == shuffle_images(images, seed=1) != shuffle_images(images, seed=2)


def test_files_with_equal_content_are_one_image(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.jpg", "b.jpg")
    (folder / "copy_of_a.jpg").write_bytes(b"a.jpg")
    images = [folder / name for name in ("a.jpg", "copy_of_a.jpg", "b.jpg")]
    shown = [path.read_bytes() for path in shuffle_images(images, seed=0)]
    assert shown == [b"b.jpg", b"b.jpg", b"a.jpg"]
    with pytest.raises(InputError, match="all samples show the same one"):
        shuffle_images(images[:2], seed=0)
