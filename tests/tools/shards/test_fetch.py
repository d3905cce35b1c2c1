"""Fetching against a server that breaks off, fails, forgets and lies: the files arrive whole, or nothing is there."""

from __future__ import annotations

import io
import json
import re
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from data_pipeline.index import ShardIndex
from data_pipeline.record import read_record
from models.common.errors import run_cli
from models.spec import IMAGE_TOKEN
from tests.support.mirror import (
    CHAT,
    REPLICA,
    Handler,
)
from tests.support.shards import image_bytes
from tools.shards import download
from tools.shards.__main__ import main
from tools.shards.sources import SOURCES


def run(name: str, out: Path, mirror: str, *options: str) -> int:
    return run_cli(main, ["fetch", name, str(out), "--base-url", mirror, "--quiet", "--jobs", "1", *options])


def test_every_source_arrives_in_the_layout_that_make_reads(mirror: str, tmp_path: Path) -> None:
    found = {}
    for name in SOURCES:
        if name != "conceptual-captions":
            assert run(name, tmp_path / name, mirror) == 0
            files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
            found[name] = sorted(str(path.relative_to(tmp_path / name)) for path in files)
    images = ["0000.png", "0001.png", "0002.png"]
    assert found["coco2017"] == [
        "annotations/captions_train2017.json",
        *(f"train2017/{image}" for image in images),
        *(f"val2017/{image}" for image in images),
    ]
    assert found["llava-instruct"] == ["llava_instruct_150k.json"]
    assert found["llava-pretrain"][:2] == ["blip_laion_cc_sbu_558k.json", "images/00000/0000.png"]
    assert found["textvqa"][:2] == ["TextVQA_0.5.1_train.json", "TextVQA_0.5.1_val.json"]
    assert found["vizwiz"][:2] == ["annotations/train.json", "images/train/0000.png"]
    assert not list(tmp_path.glob(".*"))


def spoken(folder: Path) -> list[tuple[str, ...]]:
    """The turns of each sample of a set; an answer after each question."""
    index = ShardIndex.open(folder)
    return [tuple(turn.text for turn in read_record(index.read(n)).turns) for n in range(len(index))]


def test_what_fetch_says_next_makes_shards(mirror: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every source from its server to a set, by the very commands that are printed."""
    found = {}
    for name in SOURCES:
        if name != "conceptual-captions":
            assert run(name, tmp_path / name, mirror) == 0
            command = capsys.readouterr().out.strip().rpartition("python -m tools.shards ")[2]
            command = command.replace("COCO/", f"{tmp_path}/coco2017/").replace(" SET ", f" {tmp_path}/{name}-set ")
            assert run_cli(main, [*command.split(), "--quiet", "--jobs", "1"]) == 0
            found[name] = spoken(tmp_path / f"{name}-set")
    asked = f"{IMAGE_TOKEN}\nWhat?"
    assert found == {
        "coco2017": [(IMAGE_TOKEN, "noise")],
        "llava-instruct": [(asked, "Noise.")],
        "llava-pretrain": [(asked, "Noise.")],
        "textvqa": [
            (f"{IMAGE_TOKEN}\nwhat does it say?", "noise", "which colour?", "grey"),
            (f"{IMAGE_TOKEN}\nwhat brand?", "one"),  # two answers twice: the earlier one
        ],
        "vizwiz": [(f"{IMAGE_TOKEN}\nWhat is this?", "noise"), (f"{IMAGE_TOKEN}\nIs it on?", "unanswerable")],
    }
    index = ShardIndex.open(tmp_path / "textvqa-set")
    assert [index.read(n)["png"] for n in range(2)] == [image_bytes(n, (40, 30)) for n in (1, 2)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"questions": []}, "neither TextVQA's file nor VizWiz's"),
        ([{"image": "0000.png"}], "neither TextVQA's file nor VizWiz's"),
        ({"data": [{"question": "a?", "image_id": "0001"}]}, "question 0 has no text, or no answer"),
        ([{"question": "a?", "image": "9.png", "answers": [{"answer": "b"}]}], "question 0: no image for '9.png'"),
        ([{"question": "a?", "image": [1], "answers": [{"answer": "b"}]}], "no image for [1]"),
    ],
)
def test_one_file_of_questions_of_another_shape(
    tmp_path: Path, content: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.json").write_text(json.dumps(content))
    (tmp_path / "0001.png").write_bytes(image_bytes())
    command = ["make", tmp_path / "set", "--vqa", tmp_path / "q.json", "--images", tmp_path, "--quiet"]
    assert run_cli(main, [str(part) for part in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not (tmp_path / "set").exists()


def test_a_download_that_breaks_off_goes_on(mirror: str, tmp_path: Path) -> None:
    whole = REPLICA["llava_instruct_150k.json"]
    Handler.troubles = ["break off", "break off", "503"]
    assert run("llava-instruct", tmp_path / "out", mirror) == 0
    assert (tmp_path / "out" / "llava_instruct_150k.json").read_bytes() == whole
    half = len(whole) // 2
    third = half + (len(whole) - half) // 2
    assert [asked for _, asked in Handler.asked] == [None, f"bytes={half}-", f"bytes={third}-", f"bytes={third}-"]


def test_a_later_run_goes_on_where_a_stopped_one_was(mirror: str, tmp_path: Path) -> None:
    Handler.troubles = ["", "break off", *["503"] * download.NUM_TRIES]
    assert run("coco2017", tmp_path / "out", mirror) == 2
    assert not (tmp_path / "out").exists()
    Handler.asked.clear()
    assert run("coco2017", tmp_path / "out", mirror) == 0
    assert [name for name, _ in Handler.asked] == ["val2017.zip", "train2017.zip"]
    assert Handler.asked[0][1] == f"bytes={len(REPLICA['val2017.zip']) // 2}-"


def test_a_file_that_changed_meanwhile_is_fetched_anew(mirror: str, tmp_path: Path) -> None:
    path = urlsplit(SOURCES["llava-instruct"].files[0].url).path
    Handler.troubles = ["break off", *["503"] * download.NUM_TRIES]
    assert run("llava-instruct", tmp_path / "out", mirror) == 2
    Handler.files[path] = json.dumps([*CHAT, *CHAT]).encode()
    assert run("llava-instruct", tmp_path / "out", mirror) == 0
    assert (tmp_path / "out" / "llava_instruct_150k.json").read_bytes() == Handler.files[path]


def test_a_server_that_knows_no_ranges(mirror: str, tmp_path: Path) -> None:
    Handler.troubles = ["break off", "no ranges"]
    assert run("llava-instruct", tmp_path / "out", mirror) == 0
    assert (tmp_path / "out" / "llava_instruct_150k.json").read_bytes() == REPLICA["llava_instruct_150k.json"]


@pytest.mark.parametrize("num_failures", [2, 99])
def test_a_failing_server_is_tried_again_then_named(
    mirror: str, tmp_path: Path, num_failures: int, capsys: pytest.CaptureFixture[str]
) -> None:
    Handler.troubles = ["503"] * num_failures
    assert run("llava-instruct", tmp_path / "out", mirror) == (0 if num_failures == 2 else 2)
    assert len(Handler.asked) == min(num_failures + 1, download.NUM_TRIES)
    if num_failures == 99:
        assert "broke off 5 times in a row (503" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_server_that_drips_is_not_outlasted(
    mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each byte comes in time, and a try brings some; once the server sends at its pace, what had come is kept."""
    monkeypatch.setattr("data_pipeline.download.PATIENCE_S", 0.1)
    monkeypatch.setattr("data_pipeline.download.LOOK_S", 0.02)
    Handler.troubles = ["drip"] * 99
    assert run("llava-instruct", tmp_path / "out", mirror) == 2
    assert re.search(
        r"broke off 5 times in a row \(\d+ bytes came, for 0\.1 s fewer than \d+ a second", capsys.readouterr().err
    )
    Handler.troubles = []
    assert run("llava-instruct", tmp_path / "out", mirror) == 0
    assert (tmp_path / "out/llava_instruct_150k.json").read_bytes() == REPLICA["llava_instruct_150k.json"]
    assert Handler.asked[-1][1] is not None


def bad_zip(name: str, mode: int = 0) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, b"/etc/passwd")
    return stream.getvalue()


def flipped(payload: bytes) -> bytes:
    place = payload.index(b"IDAT") + 20
    return payload[:place] + bytes([payload[place] ^ 1]) + payload[place + 1 :]


@pytest.mark.parametrize(
    ("name", "file", "payload", "reason"),
    [
        ("coco2017", "val2017.zip", REPLICA["val2017.zip"][:-9] + b"123456789", "sha256"),
        ("coco2017", "val2017.zip", REPLICA["val2017.zip"] + b"1", "bytes, expected"),
        ("vizwiz", "val.zip", flipped(REPLICA["val.zip"]), "Bad CRC-32"),
        ("vizwiz", "val.zip", b"<html>moved</html>", "not a zip file"),
        ("vizwiz", "val.zip", bad_zip("../../outside"), "stay inside"),
        ("vizwiz", "val.zip", bad_zip("/outside"), "stay inside"),
        ("vizwiz", "val.zip", bad_zip("link", stat.S_IFLNK | 0o777), "is a link"),
        ("llava-instruct", "llava_instruct_150k.json", b'[{"id": ', "cannot be used"),
        ("llava-instruct", "llava_instruct_150k.json", b"", "gave nothing"),
        ("conceptual-captions", "GCC-training.tsv", b"<html>\n", "line 1 has not 2 columns"),
    ],
)
def test_what_cannot_be_trusted_is_one_line_and_leaves_nothing(
    mirror: str, tmp_path: Path, name: str, file: str, payload: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(path for path in Handler.files if path.endswith(f"/{file}"))
    good, Handler.files[path] = Handler.files[path], payload
    assert run(name, tmp_path / "deep" / "er" / "out", mirror) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert reason in lines[0]
    assert not (tmp_path / "deep" / "er" / "out").exists()
    assert not list(tmp_path.rglob("outside"))
    Handler.files[path] = good  # what was bad was removed: the next run mends it
    assert run(name, tmp_path / "deep" / "er" / "out", mirror) == (2 if name == "conceptual-captions" else 0)


def test_wrong_names_addresses_and_places(mirror: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("coco", tmp_path / "out", mirror) == 2
    answer = capsys.readouterr().err
    assert all(name in answer for name in SOURCES)
    assert run("vizwiz", tmp_path / "out", f"{mirror}/elsewhere") == 2
    assert "answers 404" in capsys.readouterr().err
    assert run("coco2017", tmp_path / "out", mirror) == 2
    assert "another unfinished download" in capsys.readouterr().err
    assert run("coco2017", tmp_path, mirror) == 2
    assert "exists already" in capsys.readouterr().err
    assert run("coco2017", tmp_path / "new", "file:///etc") == 2
    assert "http://" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["path", "environment"])
def test_conceptual_captions_go_through_img2dataset(
    place: str, mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("conceptual-captions", out, mirror) == 2
    assert "--img2dataset-env DIR" in capsys.readouterr().err
    table = out / "GCC-training.tsv"
    assert table.read_bytes() == b"caption\turl\n" + REPLICA["GCC-training.tsv"]
    bin_folder = tmp_path if place == "path" else tmp_path / "own" / "bin"
    bin_folder.mkdir(parents=True, exist_ok=True)
    options = [] if place == "path" else ["--img2dataset-env", str(tmp_path / "own")]
    assert run("conceptual-captions", out, mirror, *options) == 2
    assert ("--img2dataset-env DIR" if place == "path" else "is no virtual environment") in capsys.readouterr().err
    (tmp_path / "own").mkdir(exist_ok=True)
    (tmp_path / "own" / ".ready").touch()
    program = bin_folder / "img2dataset"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    program.chmod(0o755)
    Handler.asked.clear()
    assert run("conceptual-captions", out, mirror, *options) == 0
    assert not Handler.asked  # the table was there already
    called = (tmp_path / "called").read_text()
    assert f"--url_list={table}" in called
    assert "--output_format=webdataset" in called
    assert f"tools.shards index {out}/shards" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("img2dataset") is None, reason="none on the PATH")
def test_the_real_img2dataset_writes_what_we_read(
    mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        Handler.files[f"/{number}.jpg"] = image_bytes(number, (640, 480), "JPEG")
    path = next(path for path in Handler.files if path.endswith(".tsv"))
    Handler.files[path] = "".join(f"caption {n}\t{mirror}/{n}.jpg\n" for n in range(4)).encode()  # one is gone
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert run("conceptual-captions", tmp_path / "out", mirror) == 0
    shards = tmp_path / "out" / "shards"
    assert run_cli(main, ["index", str(shards), "--quiet", "--jobs", "1"]) == 0
    assert run_cli(main, ["check", str(shards), "--quiet", "--jobs", "1"]) == 0
    index = ShardIndex.open(shards)
    assert sorted(turns[1] for turns in spoken(shards)) == [f"caption {n}" for n in range(3)]
    images = [member for n in range(3) for member in index.entry(n).members if member.extension == "jpg"]
    assert {(image.width, image.height) for image in images} == {(512, 384)}
