"""Excel sheets as VLMEvalKit writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from openpyxl import Workbook

from eval.benchmarks.tables import read_table
from eval.score import Sources, score
from models.common.errors import InputError


def write_sheet(path: Path, rows: list[list[object]]) -> str:
    book = Workbook()
    assert book.active is not None
    for row in rows:
        book.active.append(row)
    book.save(path)
    return str(path)


def test_vlmevalkits_predictions_are_scored_without_other_files(tmp_path: Path) -> None:
    header: list[object] = ["index", "question", "A", "B", "C", "answer", "prediction", "category"]
    rows: list[list[object]] = [
        [7, "Which?", "x", "y", None, "B", "B", "one"],
        [1000007, "Which?", "y", "x", None, "A", "The answer is A.", "one"],
        [8, "Is it?", 1, 2.0, "=1+1", "A", "C", "two"],
    ]
    file = write_sheet(tmp_path / "model_MMBench.xlsx", [header, *rows])
    found = score("mmbench_dev", Sources((file,)))
    assert found.metrics == {"circular": 50.0, "vanilla": 50.0}
    assert read_table(file)[0][0] == dict(zip(header, rows[0], strict=True))
    assert (read_table(file)[0][2]["A"], read_table(file)[0][2]["B"]) == (1, 2)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"index,answer\n"])
def test_what_is_no_sheet_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.xlsx"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is no table of this kind"):
        read_table(str(path))


def test_values_below_no_name_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no name in the first row"):
        read_table(write_sheet(tmp_path / "a.xlsx", [["index", None], [1, 2]]))
