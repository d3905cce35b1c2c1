"""The pictures of docs/images that show pages of the quickstart: `make pictures`, after `make quickstart`.

    sightline report | shards show | compare | export  ->  a page  --Chromium-->  docs/images/NAME.webp

Owns what is shown and how much of it. The pages are those that the documented commands write.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.common.errors import InputError, run_cli

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

LARGEST_BYTES = 100_000
WIDTH, SCALE = 960, 1.5
"""A page's width in CSS pixels, and a picture's pixels for each of them."""

_CARD_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 1rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { border: 1px solid #ddd; padding: .2rem .8rem; text-align: left; }
"""


@dataclass(frozen=True)
class Picture:
    """One picture: the page it is taken of, and from which heading on how much of it is shown."""

    name: str
    page: Callable[[Path, Path], Path]
    """(the quickstart's directory, a folder to write into) -> the page."""
    height: int
    """In CSS pixels."""
    below: str = "h1"
    """The picture begins at the first element of this CSS selector."""


def main(argv: list[str]) -> int:
    """Make them all, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m tools.dev.pictures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; default: all")
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="the quickstart's directory")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    asked = parser.parse_args(argv)
    if unknown := sorted({*asked.names} - PICTURES.keys()):
        raise InputError(f"no picture {', '.join(unknown)}; there are {', '.join(PICTURES)}")
    if not (asked.run / "report.html").is_file():
        raise InputError(f"{asked.run}: no finished quickstart; run `make quickstart` first")
    asked.out.mkdir(parents=True, exist_ok=True)
    folder = asked.run / "pictures"
    folder.mkdir(exist_ok=True)
    with open_chromium() as browser_page:
        for name in asked.names or PICTURES:
            file = asked.out / f"{name}.webp"
            size = take(browser_page, PICTURES[name].page(asked.run, folder), PICTURES[name], file)
            print(f"{file}: {size / 1000:.0f} kB", flush=True)
    return 0


def take(browser_page: Page, page: Path, picture: Picture, file: Path) -> int:
    """Write the picture of an HTML file to `file`, as WebP; returns its bytes.

    Raises:
        InputError: it is larger than a picture of the docs may be.
    """
    from PIL import Image

    browser_page.goto(page.resolve().as_uri())
    top = browser_page.locator(picture.below).first.evaluate("each => each.getBoundingClientRect().top + scrollY")
    end = browser_page.evaluate("document.documentElement.scrollHeight")
    clip = {"x": 0, "y": max(0, top - 12), "width": WIDTH, "height": min(picture.height, end - max(0, top - 12))}
    taken = browser_page.screenshot(clip=clip, full_page=True)  # type: ignore[arg-type]  # a TypedDict of floats
    stream = io.BytesIO()
    Image.open(io.BytesIO(taken)).convert("RGB").save(stream, "WEBP", quality=80, method=6)
    if (size := stream.tell()) > LARGEST_BYTES:
        raise InputError(f"{file.name} would have {size:,} bytes, at most {LARGEST_BYTES:,}; show less of {page}")
    file.write_bytes(stream.getvalue())
    return size


@contextmanager
def open_chromium() -> Iterator[Page]:
    """A page of a headless Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise InputError("playwright is not installed: pip install playwright") from None
    program = os.environ.get("SIGHTLINE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not program:
        raise InputError("no chromium: apt-get install chromium, or name it in SIGHTLINE_CHROMIUM")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        context = chromium.new_context(viewport={"width": WIDTH, "height": 800}, device_scale_factor=SCALE)
        context.set_default_timeout(0)  # a busy machine is no fault of the page
        try:
            yield context.new_page()
        finally:
            chromium.close()


def _command(*words: object) -> None:
    """Run a `sightline` command."""
    subprocess.run([sys.executable, "-m", "tools.cli", *map(str, words)], check=True)


def _report(run: Path, folder: Path) -> Path:
    return run / "report.html"


def _masks(run: Path, folder: Path) -> Path:
    page = folder / "masks.html"
    tokens = ("--tokenizer", run / "language", "--template", "tokenizer", "--size", 64, "--patch", 16)
    _command("shards", "show", run / "shards" / "lora", *tokens, "--count", 4, "--out", page)
    return page


def _differences(run: Path, folder: Path) -> Path:
    page = folder / "differences.html"
    _command("compare", run / "eval" / "align.json", run / "eval" / "lora.json", "--page", page)
    return page


def _parity(run: Path, folder: Path) -> Path:
    """The model card of an export, as the hub shows it."""
    from markdown_it import MarkdownIt

    out, page = folder / "w8a16", folder / "card.html"
    shutil.rmtree(out, ignore_errors=True)
    _command("export", run / "merged" / "lora", out, "--to", "w8a16", "--licence", "mit")
    text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]  # without the front matter
    body = MarkdownIt("commonmark").enable("table").render(text)
    page.write_text(f'<!doctype html><meta charset="utf-8"><style>{_CARD_STYLE}</style>{body}', encoding="utf-8")
    return page


PICTURES = {
    picture.name: picture
    for picture in (
        Picture("report", _report, height=1000),
        Picture("masks", _masks, height=640),
        Picture("differences", _differences, height=640),
        Picture("parity", _parity, height=560, below="h2:has-text('Parity')"),
    )
}

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
