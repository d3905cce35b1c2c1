"""Checkpoints are complete or absent, wherever writing is broken off; slices find their places."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trainer.checkpoint.format as checkpoint
from models.common.errors import InputError
from tests.support.checkpoints import write_checkpoint
from trainer.checkpoint.format import COMMIT, Fragment, checkpoints_in, fault_of, newest, remove_old, step_of
from trainer.checkpoint.reader import CheckpointReader


def fragments(fill: float) -> list[Fragment]:
    values = torch.arange(10.0) + fill
    moments = {"exp_avg": values * 2, "exp_avg_sq": values * 3}
    first = Fragment("projector.weight", (3, 4), 0, values, moments)
    rest = Fragment("projector.weight", (3, 4), 10, torch.tensor([fill, fill]), {key: torch.ones(2) for key in moments})
    return [first, Fragment("projector.bias", (2,), 0, rest.weight, rest.moments)]


def write(root: Path, step: int) -> Path:
    state = {"consumed": {"steps": step}}
    inherited = {"vision.weight": torch.full((2, 2), float(step))}
    return write_checkpoint(root, step, fragments=fragments(step), inherited=inherited, state=state)


def test_it_reads_back(tmp_path: Path) -> None:
    reader = CheckpointReader.open(write(tmp_path, 3))
    assert reader.state["consumed"]["steps"] == 3
    assert set(reader.names()) == {"projector.weight", "projector.bias", "vision.weight"}
    assert reader.weight("vision.weight").tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert reader.read("exp_avg", "projector.weight", 2, 3).tolist() == [10.0, 12.0, 14.0]


def test_a_slice_that_no_rank_wrote_is_named(tmp_path: Path) -> None:
    reader = CheckpointReader.open(write(tmp_path, 3))
    with pytest.raises(InputError, match=r"projector\.weight has 10 of 12 elements"):
        reader.weight("projector.weight")


def die_at(call_number: int) -> None:
    """Make this process end, as by SIGKILL, at the n-th call that changes the disk."""
    calls = iter(range(1000))

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == call_number:
                os._exit(9)
            return function(*arguments, **options)

        return call

    for name in ("save_file", "sync", "write_json"):
        setattr(checkpoint, name, dying(getattr(checkpoint, name)))
    checkpoint.shutil = SimpleNamespace(rmtree=dying(shutil.rmtree))  # type: ignore[assignment]
    for name in ("rename", "touch", "mkdir"):
        setattr(Path, name, dying(getattr(Path, name)))


@pytest.mark.slow
@pytest.mark.parametrize("kept", [1, 5])
def test_killed_at_any_write_a_complete_one_is_found(tmp_path: Path, kept: int) -> None:
    """Every call that changes the disk is a place to die; the loader finds a complete checkpoint after each."""
    write(tmp_path, 1)
    for call_number in range(100):
        child = os.fork()
        if child == 0:
            die_at(call_number)
            write(tmp_path, 2)
            remove_old(tmp_path, keep=kept)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found, _ = newest(tmp_path)
        assert found is not None
        assert CheckpointReader.open(found).state["consumed"]["steps"] in (1, 2)
        if ended == 0:
            break
        assert ended == 9
        shutil.rmtree(tmp_path / "step_000002", ignore_errors=True)
    assert call_number > 12
    write(tmp_path, 2)
    remove_old(tmp_path, keep=1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000002"]


def test_a_full_disk_leaves_the_old_one_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    with monkeypatch.context() as patch:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space left on device"):
            write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert newest(tmp_path)[0] == tmp_path / "step_000001"


@pytest.mark.parametrize("damage", ["commit", "truncate", "flip", "missing", "manifest"])
def test_a_damaged_one_is_passed_over_and_said_why(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 1)
    broken = write(tmp_path, 2)
    weights = broken / "rank_00000_of_00001.safetensors"
    match damage:
        case "commit":
            (broken / COMMIT).unlink()
        case "truncate":
            weights.write_bytes(weights.read_bytes()[:-8])
        case "flip":
            contents = bytearray(weights.read_bytes())
            contents[-1] ^= 1
            weights.write_bytes(contents)
        case "missing":
            weights.unlink()
        case "manifest":
            (broken / "manifest.json").write_text("{")
    found, reasons = newest(tmp_path)
    assert found == tmp_path / "step_000001"
    assert len(reasons) == 1
    assert "step_000002" in reasons[0]
    assert fault_of(broken) is not None


def spoil(checkpoint: Path) -> None:
    """One bit of a file, so that only its sha256 tells."""
    file = next(checkpoint.glob("*.safetensors"))
    held = bytearray(file.read_bytes())
    held[-1] ^= 1
    file.write_bytes(held)


def test_checkpoints_are_ordered_by_their_steps_as_numbers(tmp_path: Path) -> None:
    for step in (999500, 1000000):
        write(tmp_path, step)
    for other in ("step_old", "step_000001.bak", "step_"):
        (tmp_path / other).mkdir()
        assert step_of(other) == -1
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_999500", "step_1000000"]
    assert newest(tmp_path) == (tmp_path / "step_1000000", [])
    remove_old(tmp_path, keep=1)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_1000000"]
    assert (tmp_path / "step_old").is_dir()


def test_a_damaged_one_never_counts_among_those_that_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    spoil(tmp_path / "step_000003")
    remove_old(tmp_path, keep=1)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_000002", "step_000003"]
    for step in (4, 5):
        write(tmp_path, step)
    remove_old(tmp_path, keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_000004", "step_000005"]


@pytest.mark.parametrize(
    "manifest", ["[]", "{}", '{"files": {}}', '{"files": []}', '{"files": {"state.json": 3}}', '{"files": null}', "{"]
)
def test_a_manifest_that_lists_nothing_makes_no_sound_checkpoint(tmp_path: Path, manifest: str) -> None:
    (write(tmp_path, 3) / "manifest.json").write_text(manifest)
    fault = fault_of(tmp_path / "step_000003")
    assert fault is not None
    assert "its manifest" in fault


def test_two_checkpoints_of_one_state_have_ids_of_their_own(tmp_path: Path) -> None:
    first, second = (CheckpointReader.open(write(tmp_path / name, 3)).state["id"] for name in ("a", "b"))
    assert first != second
