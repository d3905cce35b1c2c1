"""Files that are complete or absent, and lines that wait for space."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from models.files import LineFile, read_lines, write_json


def test_lines_wait_for_space_and_none_is_lost_or_broken(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "new" / "lines.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # from here on the system refuses to write
    try:
        for number in range(20):
            file.write({"number": number})
        with pytest.raises(OSError, match="File too large"):
            file.sync()
        assert (tmp_path / "new/lines.jsonl").stat().st_size == 100
        assert [line["number"] for line in read_lines(tmp_path / "new/lines.jsonl")] == list(range(7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.sync()
    file.close()
    assert [line["number"] for line in read_lines(tmp_path / "new/lines.jsonl")] == list(range(20))


def test_without_a_line_there_is_no_file(tmp_path: Path) -> None:
    LineFile(tmp_path / "never").close()
    assert not any(tmp_path.iterdir())


def test_a_value_replaces_the_old_one_at_once_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "value.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", {"a": object()})
    assert (tmp_path / "value.json").read_text().strip().replace(" ", "").replace("\n", "") == '{"a":1}'
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]
