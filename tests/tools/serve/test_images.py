"""Pictures of visitors: what a browser can show, what is kept, and which examples there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.common.errors import InputError
from tests.support.bundles import image
from tools.serve.images import check_image, find_examples, keep, showable


def test_a_image_that_was_cleared_away_is_asked_for_again(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not here any more"):
        check_image(tmp_path / "gone.png")


def test_two_visitors_files_of_one_name_stay_two(tmp_path: Path) -> None:
    shown = []
    for visitor, kind in (("a", "circle"), ("b", "square")):
        (tmp_path / visitor).mkdir()
        image(kind).save(tmp_path / visitor / "scan.tif")
        shown.append(showable(tmp_path / visitor / "scan.tif", tmp_path))
    assert shown[0] != shown[1]
    assert shown[0].read_bytes() != shown[1].read_bytes()
    payload = (tmp_path / "a" / "scan.tif").read_bytes()
    assert keep(payload, tmp_path) != keep(payload, tmp_path)


def test_formats_no_browser_shows_become_png(tmp_path: Path) -> None:
    for suffix in ("tif", "jp2", "png"):
        image("circle").save(tmp_path / f"p.{suffix}")
    shown = {path.suffix: showable(path, tmp_path).suffix for path in sorted(tmp_path.glob("p.*"))}
    assert shown == {".tif": ".png", ".jp2": ".png", ".png": ".png"}


def test_fetched_bytes_are_kept_only_if_they_are_a_image(tmp_path: Path) -> None:
    source = tmp_path / "source.jpg"
    image("circle").save(source)
    (tmp_path / "kept").mkdir()
    kept = keep(source.read_bytes(), tmp_path / "kept")
    assert kept.suffix == ".jpg"
    check_image(kept)
    with pytest.raises(InputError, match="no image"):
        keep(b"<html>", tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [kept.name]


def test_examples_are_found_or_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no images"):
        find_examples(tmp_path)
    image("circle").save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in find_examples(tmp_path)] == ["a.png"]
