"""A step is computed again in its own stage alone; what cannot be replayed is said in a line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.common.errors import InputError
from tests.support.backbones import tiny_recipe
from tools.inspect.replay import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory whose stages have ledgers, moved since it was trained."""
    (tmp_path / "vision").mkdir()
    recipe = tiny_recipe(tmp_path, tmp_path / "shards") | {"run": "/elsewhere"}
    for stage in ("align", "lora"):
        (tmp_path / "run" / stage / "ledger").mkdir(parents=True)
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe))
    return tmp_path / "run"


def replayed(monkeypatch: pytest.MonkeyPatch, difference: float, *, same_rows: bool = True) -> list[Any]:
    """What `trainer.replay.replay` is called with; it answers by this difference."""
    calls: list[Any] = []

    def replay(*arguments: Any) -> Any:
        calls.append(arguments)
        sample = SimpleNamespace(num_targets=2, shard="a.tar", key="k", ref=SimpleNamespace(shard="a.tar", key="k"))
        return SimpleNamespace(
            step=3,
            batch=4,
            checkpoint="step_2",
            loss=1.0,
            logged_loss=1.0,
            difference=difference,
            same_rows=same_rows,
            rows=[(sample,)],
            row_losses=[3.0],
        )

    monkeypatch.setattr("trainer.replay.replay", replay)
    return calls


@pytest.mark.parametrize(("difference", "same_rows", "code"), [(1e-5, True, 0), (1e-3, True, 1), (0.0, False, 1)])
def test_the_loss_and_the_rows_decide(
    run: Path, monkeypatch: pytest.MonkeyPatch, difference: float, same_rows: bool, code: int
) -> None:
    calls = replayed(monkeypatch, difference, same_rows=same_rows)
    assert main([str(run), "--step", "3", "--stage", "lora"]) == code
    ((recipe, stage, step),) = calls
    assert (recipe.run, stage, step) == (str(run), "lora", 3)


def test_a_stage_must_be_named_where_there_are_several(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replayed(monkeypatch, 0.0)
    with pytest.raises(InputError, match="--stage: name one of align, lora"):
        main([str(run), "--step", "3"])
    (run / "lora" / "ledger").rmdir()
    assert main([str(run), "--step", "3"]) == 0
    assert calls[0][1] == "align"


def test_a_directory_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe\.json: not there"):
        main([str(tmp_path), "--step", "3"])
