"""Documents of a run and of a checkpoint that are damaged, or that name what is not theirs, are one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.common.errors import InputError
from models.common.source import sha256_of
from tests.support.checkpoints import write_checkpoint
from tests.support.damage import DOCUMENTS, TENSORS, rewrite_header
from trainer.checkpoint.format import Fragment, newest
from trainer.checkpoint.initial_weights import finished_checkpoint
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.records import read_rollbacks
from trainer.checkpoint.slices import ROW, SLICES_FILE
from trainer.ledger.audit import audit
from trainer.ledger.restarts import read_restarts

STATE: dict[str, Any] = {
    "consumed": {"steps": 3, "samples": 3, "tokens": 9, "draws": 3, "batches": 3},
    "num_updates": 3,
    "stream": {"slots": {"0": {"next": 3, "open": []}}},
}
WEIGHTS = "rank_00000_of_00001.safetensors"
INHERITED = "given.safetensors"


def write(root: Path, step: int = 1) -> Path:
    fragments = [Fragment("a", (4,), 0, torch.arange(4.0), {"exp_avg": torch.ones(4)})]
    return write_checkpoint(root, step, fragments=fragments, inherited={"b": torch.ones(2, 2)}, state=STATE)


def seal(directory: Path) -> None:
    """Make a checkpoint whole again by its manifest, as one who damaged it on purpose would."""
    file = directory / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in manifest["files"]:
        path = directory / name
        manifest["files"][name] |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    file.write_text(json.dumps(manifest))


def one_line(caught: pytest.ExceptionInfo[InputError], *named: object) -> None:
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    for name in named:
        assert str(name) in str(caught.value)


@pytest.mark.parametrize("damage", TENSORS)
def test_a_damaged_file_of_weights_falls_back_or_is_named(tmp_path: Path, damage: str) -> None:
    before, last = write(tmp_path, 1), write(tmp_path, 2)
    TENSORS[damage](last / INHERITED)
    found, skipped = newest(tmp_path)
    assert found == before
    assert len(skipped) == 1
    seal(last)
    with pytest.raises(InputError) as caught:
        CheckpointReader.open(last)
    one_line(caught, last / INHERITED)


@pytest.mark.parametrize("place", [0, -8])
def test_a_rank_file_that_is_cut_short_is_named(tmp_path: Path, place: int) -> None:
    last = write(tmp_path)
    (last / WEIGHTS).write_bytes((last / WEIGHTS).read_bytes()[:place])
    seal(last)
    with pytest.raises(InputError) as caught:
        CheckpointReader.open(last)
    one_line(caught, last / WEIGHTS)


@pytest.mark.parametrize(
    "rows", [[(1, 0, 0, 4)], [(0, 1, 0, 4)], [(0, 0, 1, 4)], [(0, 0, 5, 0)], [(0, 0, 0, 1 << 63)], [(0, 0, 0, 5)], None]
)
def test_a_table_of_slices_that_does_not_fit_is_named(tmp_path: Path, rows: Any) -> None:
    last = write(tmp_path)
    if rows is None:
        (last / SLICES_FILE).write_bytes(b"no table")
    else:
        np.save(last / SLICES_FILE, np.array(rows, dtype=ROW))
    seal(last)
    with pytest.raises(InputError) as caught:
        CheckpointReader.open(last)
    one_line(caught, last / SLICES_FILE)


@pytest.mark.parametrize(
    "slices",
    [
        None,
        "no json",
        "[]",
        json.dumps({"b": {"start": 0}}),
        json.dumps({"b": {"start": "0", "shape": [4]}}),
        json.dumps({"b": {"start": -1, "shape": [4]}}),
        json.dumps({"b": {"start": 1, "shape": [4]}}),
        json.dumps({"c": {"start": 0, "shape": [4]}}),
        "[" * 100_000,
    ],
)
def test_slices_that_do_not_fit_the_file_are_named(tmp_path: Path, slices: str | None) -> None:
    last = write(tmp_path)
    metadata = {} if slices is None else {"slices": slices}
    rewrite_header(last / INHERITED, lambda header: header.update(__metadata__=metadata))
    seal(last)
    with pytest.raises(InputError) as caught:
        CheckpointReader.open(last)
    one_line(caught, last / INHERITED)


@pytest.mark.parametrize("case", DOCUMENTS)
def test_a_state_that_is_none_is_named(tmp_path: Path, case: str) -> None:
    last = write(tmp_path)
    (last / "state.json").write_text(DOCUMENTS[case])
    seal(last)
    with pytest.raises(InputError) as caught:
        CheckpointReader.open(last)
    one_line(caught, last)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("consumed", 3),
        ("consumed", {"steps": "3"}),
        ("num_updates", "3"),
        ("num_updates", -1),
        ("stream", []),
        ("stream", {"slots": {"0": {"next": None, "open": []}}}),
        ("guard", {"losses": 3}),
        ("best", {"value": "x"}),
        ("reached", "vision"),
        ("base", {"vision": 3}),
        ("config", {"duration": {"count": "3", "unit": "steps"}}),
    ],
)
def test_a_value_of_another_kind_is_named_by_its_key(tmp_path: Path, key: str, value: Any) -> None:
    last = write(tmp_path)
    state = json.loads((last / "state.json").read_text())
    (last / "state.json").write_text(json.dumps({**state, key: value}))
    seal(last)
    with pytest.raises(InputError) as caught:
        CheckpointReader.open(last)
    one_line(caught, f"state.json: {key}")


def test_a_key_that_a_reader_needs_is_named_where_it_is_missing(tmp_path: Path) -> None:
    last = write(tmp_path / "checkpoints")
    state = json.loads((last / "state.json").read_text())
    del state["consumed"]
    (last / "state.json").write_text(json.dumps(state))
    seal(last)
    with pytest.raises(InputError) as caught:
        CheckpointReader.open(last).part("consumed")
    one_line(caught, "state.json: consumed: missing")
    with pytest.raises(InputError, match=r"state\.json: consumed: missing"):
        audit(tmp_path)


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "a/b", ".."])
def test_a_manifest_names_files_of_its_checkpoint_alone(tmp_path: Path, name: str) -> None:
    before, last = write(tmp_path, 1), write(tmp_path, 2)
    manifest = json.loads((last / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (last / "manifest.json").write_text(json.dumps(manifest))
    found, skipped = newest(tmp_path)
    assert found == before
    assert "manifest.json: files: " in skipped[0]


def test_a_file_that_leads_out_of_its_checkpoint_is_passed_over(tmp_path: Path) -> None:
    before, last = write(tmp_path / "checkpoints", 1), write(tmp_path / "checkpoints", 2)
    shutil.move(last / WEIGHTS, tmp_path / "outside")
    (last / WEIGHTS).symlink_to(tmp_path / "outside")
    found, skipped = newest(tmp_path / "checkpoints")
    assert found == before
    assert "a link that leads out of the checkpoint" in skipped[0]


@pytest.mark.parametrize("name", ["../../secret", "/etc", "a/b", "..", "", None, 3, ["step_000001"]])
def test_finished_json_names_a_checkpoint_of_its_stage_alone(tmp_path: Path, name: Any) -> None:
    write(tmp_path / "align" / "checkpoints")
    file = tmp_path / "align" / "finished.json"
    file.write_text(json.dumps({"checkpoint": name}))
    with pytest.raises(InputError) as caught:
        finished_checkpoint(tmp_path, "align")
    one_line(caught, f"{file}: checkpoint")


def test_finished_json_does_not_name_a_link_to_elsewhere(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside")
    root = tmp_path / "run" / "align" / "checkpoints"
    root.mkdir(parents=True)
    (root / outside.name).symlink_to(outside)
    (root.parent / "finished.json").write_text(json.dumps({"checkpoint": outside.name}))
    with pytest.raises(InputError, match="a link that leads out of"):
        finished_checkpoint(tmp_path / "run", "align")


def test_a_run_that_is_reached_by_a_link_is_a_run(tmp_path: Path) -> None:
    written = write(tmp_path / "run" / "align" / "checkpoints")
    (tmp_path / "run" / "align" / "finished.json").write_text(json.dumps({"checkpoint": written.name}))
    (tmp_path / "link").symlink_to(tmp_path / "run")
    found = finished_checkpoint(tmp_path / "link", "align")
    assert found is not None
    assert CheckpointReader.open(found).names() == ["b", "a"]


@pytest.mark.parametrize("line", ["3", "[]", '{"checkpoint": 3}', '{"checkpoint": "step_000001"}'])
def test_a_line_of_rollbacks_that_is_none_is_named_with_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "rollbacks.jsonl").write_text(f'{line}\n{{"half": ')
    with pytest.raises(InputError) as caught:
        read_rollbacks(tmp_path)
    one_line(caught, f"{tmp_path / 'rollbacks.jsonl'}, line 1: ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("attempt.json", "[]"),
        ("attempt.json", '{"resumed_at": "0", "world_size": 1}'),
        ("attempt.json", '{"world_size": 1}'),
        ("rank_00000.jsonl", '{"batch": "1"}\n'),
        ("rank_00000.jsonl", '{"batch": 1, "step": 1, "draws": [[1]], "left_out": []}\n'),
    ],
)
def test_a_ledger_of_other_kinds_is_named(tmp_path: Path, name: str, text: str) -> None:
    directory = tmp_path / "attempt_0001"
    directory.mkdir()
    (tmp_path / "attempt_x").mkdir()
    (directory / "attempt.json").write_text('{"resumed_at": 0, "world_size": 1}')
    (directory / name).write_text(text)
    with pytest.raises(InputError) as caught:
        _ = [list(each.blocks()) for each in read_restarts(tmp_path)]
    one_line(caught, directory / name)
