"""The docs' pictures are small, shown where they belong, and made by the command; the command makes one of a page."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from models.common.errors import InputError, run_cli
from tests.support.paths import REPOSITORY
from tools.dev.pictures import LARGEST_BYTES, PICTURES, SCALE, WIDTH, Picture, main, open_chromium, take

IMAGES = REPOSITORY / "docs/images"
CHROMIUM = os.environ.get("SIGHTLINE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def test_each_picture_is_small_has_a_text_and_is_on_a_page() -> None:
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    shown = {
        Path(name).name: text
        for page in pages
        for text, name in re.findall(r"!\[([^\]]+)\]\(([^)]*images/[^)]+)\)", page.read_text(encoding="utf-8"))
    }
    assert shown.keys() == {file.name for file in IMAGES.iterdir()}
    assert min(len(text) for text in shown.values()) > 20
    assert {file.stem for file in IMAGES.glob("*.webp")} == PICTURES.keys()
    for file in IMAGES.iterdir():
        assert file.stat().st_size <= LARGEST_BYTES, file.name


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium")
def test_a_picture_begins_at_its_heading_and_ends_with_the_page(tmp_path: Path) -> None:
    page, file = tmp_path / "page.html", tmp_path / "page.webp"
    page.write_text(
        "<!doctype html><style>body { margin: 0 } div { height: 500px }</style><div></div>"
        '<h2 style="margin: 0; height: 100px; background: #f00"></h2><div style="background: #00f"></div>'
    )
    with open_chromium() as browser_page:
        sizes = {
            height: take(browser_page, page, Picture("page", lambda run, folder: page, height, "h2"), file)
            for height in (2000, 112)
        }
        with Image.open(file) as cut:
            assert cut.size == (WIDTH * SCALE, 112 * SCALE)
            assert cut.getpixel((5, 100))[0] > 200  # type: ignore[index]
        whole = Picture("page", lambda run, folder: page, 2000, "h2")
        assert take(browser_page, page, whole, file) == sizes[2000] == file.stat().st_size
        with Image.open(file) as seen:
            assert seen.size == (WIDTH * SCALE, (600 + 12) * SCALE)


def test_without_a_quickstart_and_of_no_such_picture_it_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(main, ["--run", str(tmp_path)]) == 2
    assert "make quickstart" in capsys.readouterr().err
    with pytest.raises(InputError, match="no picture sunset; there are report"):
        main(["sunset"])
