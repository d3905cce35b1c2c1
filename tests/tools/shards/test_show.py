"""A page of samples: images as the encoder gets them, tokens or text, and which of it is learnt."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from models.common.errors import run_cli
from tests.support.shards import image_bytes, tiny_tokenizer, write_tar
from tools.shards.__main__ import main


def shards(*arguments: object) -> int:
    return run_cli(main, [*map(str, arguments), "--jobs", "1", "--quiet"])


def test_show_marks_what_is_learnt(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tiny_tokenizer().save_pretrained(tokenizer)
    content = json.dumps({"prompt": "<script>", "text": "It is &c."}).encode()
    (tmp_path / "set").mkdir()
    samples = [("a", {"png": image_bytes(), "json": content}), ("b", {"png": b"broken", "txt": b"b"})]
    write_tar(tmp_path / "set" / "a.tar", samples)
    assert shards("index", tmp_path / "set") == 0
    page = tmp_path / "page.html"
    options = ["--tokenizer", tokenizer, "--size", 16, "--patch", 8, "--out", page]
    assert run_cli(main, ["show", str(tmp_path / "set"), *map(str, options)]) == 0
    text = page.read_text()
    assert "&lt;image&gt; x 4" in text
    assert "cannot be decoded" in text
    assert "<script>" not in text
    learnt = "".join(re.findall(r'class="learnt">([^<]*)</span>', text)[1:])
    assert html.unescape(learnt) == "It is &c.<|im_end|>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "set", "tokenizer"]


def test_show_without_a_tokenizer_shows_the_text_beside_the_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    content = json.dumps({"prompt": "Which?\n<b>", "text": "It is &c."}).encode()
    write_tar(tmp_path / "set" / "a.tar", [("a", {"png": image_bytes(), "json": content}), ("b", {"txt": b"Text."})])
    assert shards("index", tmp_path / "set") == 0
    assert run_cli(main, ["show", str(tmp_path / "set")]) == 0
    page = tmp_path / "set.html"
    assert f"{page}: 2 of 2 samples" in capsys.readouterr().out
    text = page.read_text()
    assert text.count("<img") == 1
    assert '<span class="image">&lt;image&gt;</span>' in text
    assert "Which?\\n\n&lt;b&gt;" in text
    assert re.findall(r'class="learnt">([^<]*)</span>', text)[1:] == ["It is &amp;c.", "Text."]
    assert run_cli(main, ["show", str(tmp_path / "set"), "--template", "chatml"]) == 2
    assert "--template chatml needs --tokenizer DIR" in capsys.readouterr().err


def test_show_lays_tiles_out_as_they_lie_on_the_canvas(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tiny_tokenizer().save_pretrained(tokenizer)
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "a.tar", [("a", {"png": image_bytes(size=(90, 30)), "txt": b"wide"})])
    assert shards("index", tmp_path / "set") == 0
    page = tmp_path / "page.html"
    options = ["--tokenizer", tokenizer, "--fit", "anyres", "--size", 16, "--patch", 8, "--out", page]
    assert run_cli(main, ["show", str(tmp_path / "set"), *map(str, options)]) == 0
    text = page.read_text()
    assert "repeat(3, 1fr)" in text
    assert "4 tiles" in text
    assert text.count("<img") == 4
    assert "&lt;image&gt; x 18" in text  # 4 of the whole, 2 x 6 of the tiles, 2 line ends
