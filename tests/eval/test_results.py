"""OUT.json and its samples: refused early, written whole, shown as one table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.results import check_out, samples_path, table, write_results, write_samples
from models.common.errors import InputError


def test_a_place_that_cannot_be_written_is_refused_before_work_begins(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.json is needed"):
        check_out(tmp_path / "out.txt")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_out(tmp_path / "folder.json")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="its folder can't be made"):
        check_out(tmp_path / "file" / "out.json")
    check_out(tmp_path / "new" / "out.json")
    assert (tmp_path / "new").is_dir()


def test_samples_lie_beside_the_results(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    path = write_samples(out, "vqa", [{"answer": "caf\xe9"}, {"answer": "x"}])
    assert path == samples_path(out, "vqa") == tmp_path / "a.vqa.jsonl"
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == [{"answer": "caf\xe9"}, {"answer": "x"}]
    write_results(out, {"results": []})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.vqa.jsonl"]


def test_a_metric_that_is_missing_stands_there_with_its_reason() -> None:
    result = {
        "name": "vqa",
        "num_samples": 4,
        "metrics": {"vqa_accuracy": 50.0, "CIDEr": None},
        "intervals": {"vqa_accuracy": {"low": 10.0, "high": 90.0}},
        "unavailable": {"CIDEr": "one image"},
    }
    lines = table([result]).splitlines()
    assert lines[0].split() == ["task", "metric", "value", "95", "%", "interval", "samples"]
    assert lines[2].split() == ["vqa", "vqa_accuracy", "50.00", "10", "to", "90", "4"]
    assert lines[3].split() == ["vqa", "CIDEr", "-", "one", "image", "4"]
