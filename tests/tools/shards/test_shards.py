"""Raw data becomes shards that stock webdataset opens; bad input is one line and leaves nothing behind."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pytest
import webdataset as wds
from pyarrow import parquet

from data_pipeline.images import open_image
from data_pipeline.index import ShardIndex
from data_pipeline.record import read_record
from models.common.errors import run_cli
from models.spec import IMAGE_TOKEN
from tests.support.paths import REPOSITORY
from tests.support.patience import wait_until
from tests.support.shards import image_bytes, write_set
from tools.shards.__main__ import main
from tools.shards.raw import read_captions
from tools.shards.write import write_set as write_shards


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        (folder / f"p{number}.png").write_bytes(image_bytes(number))
    return folder


def shards(*arguments: object) -> int:
    return run_cli(main, [*(str(argument) for argument in arguments), "--quiet", "--jobs", "1"])


def llava_file(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path


def conversation(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "It is noise."}]


def test_llava_json_with_one_several_and_no_images(tmp_path: Path, photos: Path) -> None:
    records = [
        {"id": "a/1", "image": "p0.png", "conversations": conversation(f"What?\n{IMAGE_TOKEN}")},
        {"id": "a/1", "image": ["p1.png", "p2.png"], "conversations": conversation(f"{IMAGE_TOKEN} or {IMAGE_TOKEN}?")},
        {"id": 3, "conversations": conversation("Hello?")},
    ]
    out = tmp_path / "set"
    source = llava_file(tmp_path / "a.json", records)
    assert shards("make", out, "--llava", source, "--images", photos, "--samples-per-shard", 2) == 0
    index = ShardIndex.open(out)
    assert index.shard_sizes == [2, 1]
    found = [read_record(index.read(sample)) for sample in range(3)]
    assert found[0].turns[0].text == f"{IMAGE_TOKEN}\nWhat?"
    assert found[1].images == (image_bytes(1), image_bytes(2))
    assert found[2].images == ()
    stock = list(wds.WebDataset([str(out / name) for name in index.shard_names], shardshuffle=False))
    assert [sample["__key__"] for sample in stock] == ["000000000", "000000001", "000000002"]
    assert stock[1]["1.png"] == image_bytes(2)


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_captions_from_every_kind_of_table(tmp_path: Path, photos: Path, ending: str) -> None:
    rows = [{"file_name": f"p{n}.png", "caption": f'A "quoted", long\ncaption {n}'} for n in range(5)]
    path = tmp_path / f"captions.{ending}"
    if ending == "csv":
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, ["file_name", "caption"])
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(stream.getvalue(), newline="")
    elif ending == "parquet":
        parquet.write_table(pyarrow.table({name: [row[name] for row in rows] for name in rows[0]}), path)
    else:
        path.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    assert shards("make", tmp_path / "set", "--captions", path, "--images", photos) == 0
    index = ShardIndex.open(tmp_path / "set")
    assert [index.read(n)["txt"].decode() for n in range(5)] == [row["caption"] for row in rows]


def test_a_folder_with_a_prompt(tmp_path: Path, photos: Path) -> None:
    for path in list(photos.iterdir()):
        path.with_suffix(".txt").write_text(f"caption of {path.stem}\n")
    assert shards("make", tmp_path / "set", "--folder", photos, "--prompt", "Describe it.") == 0
    record = read_record(ShardIndex.open(tmp_path / "set").read(3))
    assert record.turns[0].text == f"{IMAGE_TOKEN}\nDescribe it."
    assert record.turns[1].text == "caption of p3"


@pytest.mark.slow
def test_equal_input_gives_equal_bytes_for_any_number_of_processes(tmp_path: Path, photos: Path) -> None:
    source = llava_file(tmp_path / "a.json", [{"file_name": f"p{n}.png", "caption": "a"} for n in range(5)])
    for jobs in (1, 2):
        samples = read_captions(source, photos, "")
        write_shards(tmp_path / f"set{jobs}", samples, 2, jobs=jobs)
    one, two = (ShardIndex.open(tmp_path / f"set{jobs}") for jobs in (1, 2))
    assert one.fingerprint == two.fingerprint
    for name in one.shard_names:
        assert (tmp_path / "set1" / name).read_bytes() == (tmp_path / "set2" / name).read_bytes()


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, photos: Path) -> None:
    records = [{"file_name": f"p{n % 5}.png", "caption": f"{n}"} for n in range(1500)]
    source = llava_file(tmp_path / "a.json", records)
    command = ["make", str(tmp_path / "set"), "--captions", str(source), "--images", str(photos)]
    command += ["--samples-per-shard", "15", "--jobs", "1", "--quiet"]
    process = subprocess.Popen([sys.executable, "-m", "tools.shards", *command])
    work = tmp_path / ".set.making"
    wait_until("a tar is written", lambda: list(work.glob("*.tar")), every_s=0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in work.glob("*.tar")}
    assert kept
    assert not (tmp_path / "set").exists()
    assert main(command) == 0
    assert all((tmp_path / "set" / name).stat().st_mtime_ns == written for name, written in kept.items())
    assert len(ShardIndex.open(tmp_path / "set")) == 1500
    assert sorted(path.name for path in (tmp_path / "set").iterdir() if path.suffix != ".tar") == ["index"]


def _renamed(path: Path, name: str) -> Path:
    """A copy under another name."""
    return Path(shutil.copy(path, path.with_name(name)))


def bad_inputs(tmp_path: Path, photos: Path) -> dict[str, tuple[list[object], str]]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.json").write_text("")
    (photos / "fake.png").write_bytes(b"not an image")
    images = ["--images", photos]
    good = {"image": "p0.png", "conversations": conversation(f"{IMAGE_TOKEN}\nWhat?")}

    def llava(name: str, content: Any) -> list[object]:
        return ["--llava", llava_file(tmp_path / name, content), *images]

    return {
        "missing file": (["--llava", tmp_path / "none.json", *images], "no file"),
        "directory": (["--captions", tmp_path / "empty", *images], "read by its ending"),
        "blank": (["--llava", tmp_path / "blank.json", *images], "is empty"),
        "not parquet": (["--captions", _renamed(tmp_path / "blank.json", "a.parquet"), *images], "is not parquet"),
        "no parquet": (["--captions", tmp_path / "none.parquet", *images], "no file"),
        "no records": (llava("a.json", []), "is empty"),
        "an object": (llava("b.json", {"a": 1}), "holds a dict, expected a list"),
        "other shape": (llava("c.json", [{"question": 1}]), "record 0 has no `conversations`"),
        "not objects": (llava("d.json", [1]), "record 0 is a int"),
        "bad turns": (
            llava("e.json", [good, good | {"id": "x7", "conversations": [{"from": "gpt"}]}]),
            "record 1 (x7)",
        ),
        "lost image": (
            llava("f.json", [good, good | {"id": "x8", "image": "gone.png"}]),
            "record 1 (x8): no image",
        ),
        "fake image": (
            llava("g.json", [good, good | {"image": "fake.png"}]),
            "fake.png cannot be decoded: it is no image of a known kind",
        ),
        "no images": (["--llava", llava_file(tmp_path / "h.json", [good])], "--images DIR is missing"),
        "no caption": (["--captions", llava_file(tmp_path / "i.json", [{"file_name": "p0.png"}]), *images], "caption"),
        "no folder": (["--folder", tmp_path / "none"], "no directory"),
        "no images in the folder": (["--folder", tmp_path / "empty"], "holds no images"),
        "no text": (["--folder", photos], "has no text"),
    }


def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (arguments, expected) in bad_inputs(tmp_path, photos).items():
        assert shards("make", tmp_path / "out" / "set", *arguments) == 2, name
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, name
        assert expected in lines[0], name
        assert not (tmp_path / "out" / "set").exists()
        assert not list(tmp_path.glob("out/.*")), name


def test_an_existing_directory_is_not_touched(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = llava_file(tmp_path / "a.json", [{"file_name": "p0.png", "caption": "a"}])
    assert shards("make", photos, "--captions", source, "--images", photos) == 2
    assert "exists already" in capsys.readouterr().err
    assert len(list(photos.iterdir())) == 5


def test_check_lists_what_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = write_set(tmp_path, [3, 2])
    assert shards("check", tmp_path) == 0
    path, member = tmp_path / index.shard_names[1], index.entry(4).members[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: member.offset] + b"\0" + whole[member.offset + 1 :])
    capsys.readouterr()
    assert shards("check", tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("shard-000001.tar\t000004\t")


def test_what_img2dataset_wrote_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fixture was written by img2dataset 1.47.0, by the call in `tools.shards.images`, from four addresses on a
    local server, of which one was gone. Its KEY.json holds facts about the download, no text to learn."""
    shutil.copy(REPOSITORY / "tests" / "support" / "fixtures" / "img2dataset.tar", tmp_path / "00000.tar")
    assert shards("index", tmp_path) == 0
    assert "3 samples in 1 shards" in capsys.readouterr().out
    assert shards("check", tmp_path) == 0
    index = ShardIndex.open(tmp_path)
    for sample in range(3):
        number = int(index.key_of(sample))
        record = read_record(index.read(sample))
        assert [turn.text for turn in record.turns] == [IMAGE_TOKEN, f"caption {number}"]
        assert [open_image(image).size for image in record.images] == [(64, 48)]


def test_what_open_clip_writes_opens(tmp_path: Path) -> None:
    """The layout of the tars in open_clip's tests/test_wds.py: numbered from 0 in every tar, by tarfile alone."""
    for tar, count in ((0, 10), (1, 5)):
        with tarfile.open(tmp_path / f"test_data_{tar:03d}.tar", "w") as archive:
            for number in range(count):
                for ending, payload in (("png", image_bytes(number)), ("txt", f"{tar:03d}_{number}".encode())):
                    info = tarfile.TarInfo(f"{number}.{ending}")
                    info.size = len(payload)
                    archive.addfile(info, io.BytesIO(payload))
    assert shards("index", tmp_path) == 0
    index = ShardIndex.open(tmp_path)
    captions = [read_record(index.read(sample)).turns[1].text for sample in range(len(index))]
    assert captions == [f"000_{number}" for number in range(10)] + [f"001_{number}" for number in range(5)]


def test_coco_captions_one_sample_each(tmp_path: Path, photos: Path) -> None:
    content = {
        "images": [{"id": 7, "file_name": "p0.png"}, {"id": 8, "file_name": "p1.png"}],
        "annotations": [
            {"image_id": 8, "caption": "One. "},
            {"image_id": 7, "caption": "Two."},
            {"image_id": 8, "caption": "3"},
        ],
    }
    path = tmp_path / "captions.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    assert shards("make", tmp_path / "set", "--coco", path, "--images", photos) == 0
    index = ShardIndex.open(tmp_path / "set")
    assert [index.read(n)["txt"] for n in range(3)] == [b"One.", b"Two.", b"3"]
    assert index.read(0)["png"] == image_bytes(1)


def test_vqa_questions_of_a_image_are_one_conversation(tmp_path: Path, photos: Path) -> None:
    (photos / "p0.png").rename(photos / "COCO_train2014_000000000009.png")
    asked = [(9, "What?", 1), ("p1", "Where?", 2), (9, "Why?", 3)]
    questions = [{"image_id": image, "question": text, "question_id": n} for image, text, n in asked]
    said = {1: ["a", "b", "b"], 2: ["here", "there"], 3: ["c"]}
    answers = [{"question_id": n, "answers": [{"answer": text} for text in texts]} for n, texts in said.items()]
    files = [
        llava_file(tmp_path / "q.json", {"questions": questions}),
        llava_file(tmp_path / "a.json", {"annotations": answers}),
    ]
    assert shards("make", tmp_path / "set", "--vqa", *files, "--images", photos, "--prompt", "Be short.") == 0
    index = ShardIndex.open(tmp_path / "set")
    turns = read_record(index.read(0)).turns
    assert [turn.text for turn in turns] == [f"{IMAGE_TOKEN}\nWhat?\nBe short.", "b", "Why?", "c"]
    assert [turn.text for turn in read_record(index.read(1)).turns][1] == "here"
    (photos / "p1.png").unlink()
    assert shards("make", tmp_path / "other", "--vqa", *files, "--images", photos) == 2


def test_images_are_shrunk_on_request(tmp_path: Path, photos: Path) -> None:
    rows = [{"file_name": f"p{n}.png", "caption": "a"} for n in range(2)]
    (photos / "p0.png").write_bytes(image_bytes(0, (90, 60)))
    source = llava_file(tmp_path / "a.json", rows)
    assert shards("make", tmp_path / "set", "--captions", source, "--images", photos, "--resize", 20) == 0
    index = ShardIndex.open(tmp_path / "set")
    sizes = [(member.extension, member.width, member.height) for n in range(2) for member in index.entry(n).members]
    assert sizes == [("jpg", 30, 20), ("txt", 0, 0), ("png", 20, 16), ("txt", 0, 0)]
