"""A damaged or hostile JSON document is one line with the file and the key, at once."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import NotRequired, TypedDict

from models.common import documents
from models.common.documents import bare_name, check, parse, read_as, read_json, read_value
from models.common.errors import InputError
from tests.support.paths import REPOSITORY


class Sized(TypedDict):
    name: documents.Text
    sizes: list[int]
    scale: NotRequired[float]


BROKEN = {
    "empty": b"",
    "cut short": b'{"name": "a", "si',
    "no UTF-8": b'{"name": "\xff"}',
    "endless number": b"9" * 5000,
    "deep": b"[" * 100_000,
    "deep and whole": b"[" * 500 + b"]" * 500,
    "deep objects": b'{"a":' * 300 + b"1" + b"}" * 300,
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_document_is_one_line_with_the_file(tmp_path: Path, case: str) -> None:
    (tmp_path / "x.json").write_bytes(BROKEN[case])
    with pytest.raises(InputError) as caught:
        read_value(tmp_path / "x.json", "fetch it again")
    assert str(caught.value).startswith(f"{tmp_path}/x.json: ")
    assert str(caught.value).endswith("; fetch it again")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_nesting_is_allowed_up_to_the_limit() -> None:
    for depth in (1, documents.MAX_DEPTH):
        assert not documents._is_deeper(json.loads("[" * depth + "]" * depth), documents.MAX_DEPTH)
    assert documents._is_deeper(json.loads("[" * 65 + "]" * 65), documents.MAX_DEPTH)
    assert not documents._is_deeper(3, documents.MAX_DEPTH)


def test_a_document_that_is_not_there_or_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"x\.json: no such file; is .* complete\?"):
        read_json(tmp_path, "x.json")
    (tmp_path / "x.json").mkdir()
    with pytest.raises(InputError, match=r"x\.json: Is a directory"):
        read_json(tmp_path, "x.json")
    monkeypatch.setattr(documents, "MAX_BYTES", 10)
    (tmp_path / "y.json").write_text('{"a": "0123456789"}')
    with pytest.raises(InputError, match=r"y\.json: 19 bytes, where at most 10 are read"):
        read_json(tmp_path, "y.json")


WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([], "found a list; "),
    "a key is missing": ({"name": "a"}, "sizes: missing"),
    "a text for a list": ({"name": "a", "sizes": "12"}, "sizes: found '12'; "),
    "a text for a number": ({"name": "a", "sizes": [1, "2"]}, "sizes.1: found '2'; "),
    "a truth for a number": ({"name": "a", "sizes": [True]}, "sizes.0: found True; "),
    "a number for a text": ({"name": 1, "sizes": []}, "name: found 1; "),
    "null": ({"name": "a", "sizes": None}, "sizes: found None; "),
    "a long value": ({"name": "a", "sizes": "x" * 1000}, "sizes: found 'xxx"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_named_by_its_key(tmp_path: Path, case: str) -> None:
    value, expected = WRONG[case]
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(InputError) as caught:
        read_as(tmp_path / "x.json", Sized)
    assert str(caught.value).startswith(f"{tmp_path}/x.json: {expected}")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_a_right_value_stays_as_it_is() -> None:
    value = {"name": "a\udcff", "sizes": [1], "scale": 1, "more": {"x": [None]}}
    assert check(value, Sized, "here") is value
    assert parse('{"a": 1}', "here") == {"a": 1}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a\\b", "a\0", "\ud83d", "a/"])
def test_only_a_bare_name_names_a_file(name: str) -> None:
    with pytest.raises(InputError, match=r"^here: key: .* is no name of a file right there"):
        bare_name(name, "here", "key")


def test_a_bare_name_may_be_of_any_letters() -> None:
    for name in ("a", "...", "été.tar", "a b", "\udcff"):
        assert bare_name(name, "here", "key") == name


PARSERS = {"json.loads", "json.load", "json.JSONDecoder", "safe_open", "load_file", "numpy.load", "pickle.load"}
PACKAGES = ("models", "data_pipeline", "eval", "trainer", "tools")


def test_documents_and_headers_are_read_in_one_place() -> None:
    """Who parses JSON or opens safetensors on his own forgets a fault of those above; examples read their own files."""
    found = set()
    for file in (path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")):
        if file.is_relative_to(REPOSITORY / "tools" / "examples"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in PARSERS:
                found.add((str(file.relative_to(REPOSITORY)), ast.unparse(node.func)))
    assert found == {("models/common/documents.py", "json.loads")}
