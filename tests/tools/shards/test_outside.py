"""A table that names files outside of its folder of images packs none of them, unless that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.common.errors import run_cli
from tests.support.bundles import image
from tools.shards.__main__ import main


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    image("circle").save(folder / "deep" / "good.jpg")
    image("square").save(tmp_path / "secret.jpg")
    return folder


def make(tmp_path: Path, photos: Path, option: str, name: str, *words: str) -> int:
    records = {
        "--captions": [{"file_name": name, "caption": "a shape"}],
        "--llava": [
            {
                "id": "1",
                "image": name,
                "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A shape."}],
            }
        ],
        "--coco": {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "a shape"}]},
    }
    (tmp_path / "table.json").write_text(json.dumps(records[option]))
    command = ["make", str(tmp_path / "set"), option, str(tmp_path / "table.json"), "--images", str(photos), "--quiet"]
    return run_cli(main, [*command, *words])


@pytest.mark.parametrize("option", ["--captions", "--llava", "--coco"])
@pytest.mark.parametrize("name", ["../secret.jpg", "deep/../../secret.jpg", "ABSOLUTE"])
def test_a_file_outside_is_refused(
    option: str, name: str, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = name.replace("ABSOLUTE", str(tmp_path / "secret.jpg"))
    assert make(tmp_path, photos, option, name) == 2
    assert "--outside allows it" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
    assert make(tmp_path, photos, option, name, "--outside") == 0


def test_a_file_in_a_folder_below_is_taken(tmp_path: Path, photos: Path) -> None:
    assert make(tmp_path, photos, "--captions", "deep/../deep/good.jpg") == 0
