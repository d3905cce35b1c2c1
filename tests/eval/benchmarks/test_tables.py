"""Tables, and pictures inside of them: here and at an address."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.benchmarks.rows import read_rows
from eval.benchmarks.spec import load
from eval.benchmarks.tables import ParquetPicture, read_table
from models.common.errors import InputError


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(path: Path) -> Path:
    """AI2D as the hub has it: two row groups, pictures inside."""
    images = [{"bytes": png(colour), "path": None} for colour in ("red", "lime", "blue")]
    table = pa.table(
        {
            "question": ["a?", "b?", "c?"],
            "options": [["x", "y"], ["x", "y"], ["x", "y", "z"]],
            "answer": ["0", "1", "2"],
            "image": images,
        }
    )
    pq.write_table(table, path, row_group_size=2)
    return path


def test_parquet_rows_hold_pictures_that_are_read_when_looked_at(tmp_path: Path) -> None:
    path = str(write_parquet(tmp_path / "test.parquet"))
    rows = read_rows(load("ai2d"), [path]).rows
    assert [row.truth for row in rows] == ["A", "B", "C"]
    assert rows[2].options == {"A": "x", "B": "y", "C": "z"}
    assert [row.picture.read() for row in rows] == [png("red"), png("lime"), png("blue")]


def test_the_same_file_at_an_address(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "test.parquet")
    with fsspec.open("memory://hub/test.parquet", "wb") as stream:
        stream.write(path.read_bytes())
    (here, own), (there, other) = read_table(str(path)), read_table("memory://hub/test.parquet")
    assert own == other
    assert [row["question"] for row in here] == [row["question"] for row in there]
    picture = there[1]["image"]
    assert isinstance(picture, ParquetPicture)
    assert picture.read() == png("lime")


def test_a_tsv_holds_pictures_as_text(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.effect_noise((32, 32), 50).convert("RGB").save(stream, "PNG")
    text = base64.b64encode(stream.getvalue()).decode()
    path = tmp_path / "mmbench.tsv"
    path.write_text(
        f'index\tquestion\thint\tA\tB\tC\tD\tanswer\timage\n7\t"Say ""a""?"\t\tx\ty\t\t\tB\t{text}\n', encoding="utf-8"
    )
    (row,) = read_rows(load("mmbench_dev"), [str(path)]).rows
    assert (row.question, row.truth, row.options) == ('Say "a"?', "B", {"A": "x", "B": "y"})
    assert row.picture.read() == stream.getvalue()


@pytest.mark.parametrize("name", ["test.parquet", "test.tsv"])
def test_what_is_no_table_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match="no such file"):
        read_table(str(path))
    path.write_bytes(b"\xff\xfe nothing")
    with pytest.raises(InputError, match=r"no (parquet|table)"):
        read_table(str(path))
