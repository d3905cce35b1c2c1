"""`make` writes only what `check` calls good, says of everything else why, and reads what the field writes."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet

from data_pipeline.index import ShardIndex
from data_pipeline.record import read_record
from models.common.errors import run_cli
from models.spec import IMAGE_TOKEN
from tests.support.shards import image_bytes
from tools.shards.__main__ import main

JPEG = image_bytes(file_format="JPEG")
CHAT = [{"role": "user", "content": f"{IMAGE_TOKEN}What?"}, {"role": "assistant", "content": "Noise."}]
UNTAGGED = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Noise."}]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jfif", "b.jpe", "c", "d.png", "e.001.jpg"):
        (folder / name).write_bytes(JPEG)
    return folder


def make(tmp_path: Path, *arguments: object) -> int:
    return run_cli(main, ["make", str(tmp_path / "set"), *map(str, arguments), "--quiet", "--jobs", "1"])


def records(tmp_path: Path) -> list[Any]:
    assert run_cli(main, ["check", str(tmp_path / "set"), "--quiet", "--jobs", "1"]) == 0
    index = ShardIndex.open(tmp_path / "set")
    return [read_record(index.read(number)) for number in range(len(index))]


def table(tmp_path: Path, name: str, content: str) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    return path


def test_images_of_any_ending_and_none_are_found_by_their_content(tmp_path: Path, photos: Path) -> None:
    for name in ("a", "b", "c", "d", "e.001"):
        (photos / f"{name}.txt").write_text(f"caption of {name}")
    assert make(tmp_path, "--folder", photos) == 0
    found = records(tmp_path)
    assert [record.turns[1].text[-1] for record in found] == ["a", "b", "c", "d", "1"]
    assert all(record.images == (JPEG,) for record in found)
    members = [ShardIndex.open(tmp_path / "set").entry(number).members[0].extension for number in range(5)]
    assert members == ["jfif", "jpe", "jpg", "jpg", "jpg"]


def test_a_prompt_may_place_the_image(tmp_path: Path, photos: Path) -> None:
    source = table(tmp_path, "a.jsonl", json.dumps({"file_name": "a.jfif", "caption": "Noise."}))
    assert make(tmp_path, "--captions", source, "--images", photos, "--prompt", f"{IMAGE_TOKEN}\nDescribe.") == 0
    assert records(tmp_path)[0].turns[0].text == f"{IMAGE_TOKEN}\nDescribe."


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", json.dumps([{"file_name": "a.jfif", "caption": f"An {IMAGE_TOKEN}."}]), "outside the user's turns"),
        ("a.json", json.dumps([{"file_name": "a.jfif", "caption": " "}]), "the answers are empty"),
        ("a.json", '[{"file_name": "a.jfif", "caption": "half \\ud83d"}]', "half of a character"),
        ("a.json", json.dumps([{"file_name": "A" * 5000, "caption": "a"}]), "5000 characters 'AAAA"),
        ("a.csv", "file_name,caption\na.jfif,A man, riding a horse\n", "line 2 has 3 fields, the heading has 2"),
        ("a.csv", "picture,words\na.jfif,A man\n", "its heading is 'picture,words'"),
        ("a.csv", "file_name,caption\ra.jfif,A man\r", "its heading is 'file_name,caption"),
        ("a.csv", "file_name,caption,caption\na.jfif,A man,A horse\n", "two columns are called caption"),
        ("a.json", json.dumps([{"file_name": "a\nb.jpg", "caption": "a"}]), "a\\nb.jpg"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_nothing_is_written(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, reason: str
) -> None:
    assert make(tmp_path, "--captions", table(tmp_path, name, content), "--images", photos) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert reason in line
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "set/"))]


def test_all_bad_records_are_counted_and_listed_and_some_may_be_left_out(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"file_name": f"{n}.png" if n < 4 else "a.jfif", "caption": f"{n}"} for n in range(10)]
    source = table(tmp_path, "a.json", json.dumps(rows))
    arguments = ["--captions", source, "--images", photos]
    assert make(tmp_path, *arguments, "--skip-bad", "39%") == 2
    assert "4 of 10 records cannot be used" in capsys.readouterr().err
    listed = (tmp_path / "set.bad.jsonl").read_text().strip().split("\n")
    assert [json.loads(line)["problem"].split(":")[1] for line in listed] == [f" record {n}" for n in range(4)]
    assert make(tmp_path, *arguments, "--skip-bad", "40") == 0
    assert [record.turns[1].text for record in records(tmp_path)] == ["4", "5", "6", "7", "8", "9"]


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_the_separator_is_found(tmp_path: Path, photos: Path, separator: str, ending: str) -> None:
    lines = [separator.join(fields) for fields in (("filepath", "title"), ("a.jfif", "A man\u2028and\x85a horse"))]
    assert make(tmp_path, "--captions", table(tmp_path, f"a.{ending}", "\r\n".join(lines)), "--images", photos) == 0
    assert records(tmp_path)[0].turns[1].text == "A man\u2028and\x85a horse"


def test_line_feeds_alone_end_json_lines(tmp_path: Path, photos: Path) -> None:
    lines = [json.dumps({"file_name": "a.jfif", "caption": f"a\u2028b\x0b{n}"}, ensure_ascii=False) for n in range(2)]
    assert make(tmp_path, "--captions", table(tmp_path, "a.jsonl", "\n".join(lines)), "--images", photos) == 0
    assert [record.turns[1].text for record in records(tmp_path)] == ["a\u2028b\x0b0", "a\u2028b\x0b1"]


@pytest.mark.parametrize(
    "record",
    [
        {"images": ["a.jfif"], "messages": CHAT},
        {"images": ["a.jfif"], "conversations": UNTAGGED},
        {"image": base64.b64encode(JPEG).decode(), "conversations": UNTAGGED},
        {"image": f"data:image/jpeg;base64,{base64.b64encode(JPEG).decode()}", "conversations": UNTAGGED},
    ],
    ids=["messages", "untagged", "base64", "data address"],
)
def test_the_field_s_ways_to_name_images_are_read(tmp_path: Path, photos: Path, record: dict[str, Any]) -> None:
    assert make(tmp_path, "--llava", table(tmp_path, "a.json", json.dumps([record])), "--images", photos) == 0
    (found,) = records(tmp_path)
    assert found.images == (JPEG,)
    assert found.turns[0].text == f"{IMAGE_TOKEN}\nWhat?"


def test_parquet_of_the_hub_is_read(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": JPEG, "path": "x.jpg"}, "conversations": UNTAGGED, "text": f"{n}"} for n in range(2)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert make(tmp_path, "--llava", tmp_path / "a.parquet") == 0
    assert [record.images for record in records(tmp_path)] == [(JPEG,)] * 2
    (tmp_path / "set").rename(tmp_path / "other")
    assert make(tmp_path, "--captions", tmp_path / "a.parquet") == 0
    assert [record.turns[1].text for record in records(tmp_path)] == ["0", "1"]


def test_an_id_that_two_images_answer_to_is_ambiguous(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "vizwiz"
    folder.mkdir()
    for name in ("VizWiz_train_00000001", "VizWiz_val_00000001", "area_\u00b2"):
        (folder / f"{name}.jpg").write_bytes(JPEG)
    row = {"question": "What?", "answers": ["a"]}
    by_number = table(tmp_path, "a.json", json.dumps([row | {"image_id": 1}]))
    assert make(tmp_path, "--vqa", by_number, "--images", folder) == 2
    assert "may be VizWiz_train_00000001.jpg or VizWiz_val_00000001.jpg" in capsys.readouterr().err
    by_name = table(tmp_path, "b.json", json.dumps([row | {"image": "VizWiz_val_00000001.jpg"}]))
    assert make(tmp_path, "--vqa", by_name, "--images", folder) == 0


@pytest.mark.parametrize(
    ("option", "content", "reason"),
    [
        ("--vqa", "[" * 100_000, "not valid JSON: nested too deeply"),
        ("--vqa", json.dumps([{"image_id": True, "question": "What?", "answers": ["a"]}]), "no image for True"),
        (
            "--coco",
            json.dumps({"images": [{"id": [1]}], "annotations": [{"image_id": [1]}]}),
            "is not among the images",
        ),
        (
            "--coco",
            json.dumps({"images": [{"id": 1, "file_name": name} for name in "ab"], "annotations": [{"image_id": 1}]}),
            "id 1 comes twice, with 'a' and 'b'",
        ),
        ("--llava", json.dumps([{"image": "c", "images": ["c", "c"], "conversations": UNTAGGED}]), "which differ"),
        ("--llava", json.dumps([{"id": float("nan"), "image": "c", "conversations": UNTAGGED}]), "JSON compliant"),
    ],
)
def test_annotations_that_say_two_things_or_none_are_one_line(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], option: str, content: str, reason: str
) -> None:
    (photos / "x_1.jpg").write_bytes(JPEG)
    assert make(tmp_path, option, table(tmp_path, "a.json", content), "--images", photos) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert reason in line
