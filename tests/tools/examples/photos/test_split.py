"""Photos are held out by seed, never captions of a photo that is trained on; a wrong DATA is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.common.errors import InputError, run_cli
from tools.examples.photos.split import main, read_entries, split

ENTRIES = [{"file_name": f"{number // 2}.jpg", "caption": f"Caption {number}."} for number in range(40)]


def test_a_photos_captions_stay_together_and_the_seed_decides() -> None:
    train, held_out = split(ENTRIES, 5, seed=0)
    sides = [{entry["file_name"] for entry in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [15, 5]
    assert sorted(train + held_out, key=ENTRIES.index) == ENTRIES
    assert split(ENTRIES, 5, seed=0) == (train, held_out)
    assert split(list(reversed(ENTRIES)), 5, seed=0)[1] == held_out[::-1]  # the list's order decides nothing
    assert split(ENTRIES, 5, seed=1) != (train, held_out)
    for wrong in (0, 20):
        with pytest.raises(InputError, match="there are 20 photos"):
            split(ENTRIES, wrong, seed=0)


def test_both_lists_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "captions.json").write_text(json.dumps(ENTRIES))
    assert (
        run_cli(main, [str(tmp_path), str(tmp_path / "out"), "--held-out", "5", "--prompt", "What?", "--seed", "3"])
        == 0
    )
    assert "30 captions to train on, 10 held out, drawn with seed 3" in capsys.readouterr().out
    written = [json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("train", "held_out")]
    assert tuple(written) == split(ENTRIES, 5, seed=3)
    golden = json.loads((tmp_path / "out" / "golden.json").read_text())
    of_train = {(entry["file_name"], entry["caption"]) for entry in written[0]}
    assert len(golden) == 30  # 48 where there are so many
    assert {(Path(entry["image"]).name, entry["answer"]) for entry in golden} <= of_train
    assert {(Path(entry["image"]).parent, entry["question"]) for entry in golden} == {(tmp_path / "images", "What?")}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "captions.json: not there; DATA is a folder"),
        ("{", "not JSON"),
        ([], "a list of {file_name, caption} is needed"),
        ([{"file_name": "a.jpg", "caption": "A."}, {"image": "b.jpg"}], "entry 1: file_name and caption, two texts"),
    ],
)
def test_a_wrong_folder_is_one_line(content: Any, line: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "captions.json").write_text(content if isinstance(content, str) else json.dumps(content))
        (tmp_path / "images").mkdir()
    with pytest.raises(InputError) as caught:
        read_entries(tmp_path)
    assert line in str(caught.value)


def test_images_are_needed(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text("[]")
    with pytest.raises(InputError, match="images: not there"):
        read_entries(tmp_path)
