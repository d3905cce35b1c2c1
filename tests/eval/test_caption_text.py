"""The words of captions: PTB's through Java, plain ones where there is no Java."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eval.caption_text import JavaError, plain_tokenize, ptb_tokenize, tokenize
from tests.eval.conftest import write_program

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java on PATH")


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("A man's t-shirt isn't RED.", "a man 's t-shirt is n't red"),
        ("They’re  here;\n(two) of 3!", "they 're here two of 3"),
        ("can't 'quoted' rock'n'roll", "ca n't quoted rock n roll"),
        ("", ""),
    ],
)
def test_plain_words(sentence: str, words: str) -> None:
    assert plain_tokenize(sentence) == words


def test_without_java_all_groups_have_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    made = tokenize({"a": ["It's red.", "Red\u2028one"]}, {"a": ["A Dog"]})
    assert made.captions == ({"a": ["it 's red", "red one"]}, {"a": ["a dog"]})
    assert made.tokenizer == "plain"
    assert made.reason == "Java was not found on PATH"


def test_a_ptb_tokenizer_that_hangs_gives_up(fake_java: Path) -> None:
    write_program(fake_java, "sleep 86400; echo done")
    with pytest.raises(JavaError, match=r"no answer in 0\.2 s"):
        ptb_tokenize(["a dog"], timeout_s=0.2)


@needs_java
def test_ptb_words_are_those_of_pycocoevalcap() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = ["A man (in red) isn't here.", 'It\'s a t-shirt, 3.5 m; "x" -- $5!', "...", "Café & bar"]
    theirs = PTBTokenizer().tokenize({place: [{"caption": text}] for place, text in enumerate(captions)})
    assert ptb_tokenize(captions) == [theirs[place][0] for place in range(len(captions))]
