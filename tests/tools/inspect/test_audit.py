"""Every stage with a ledger is audited; an account that is not clean is told and ends with 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.common.errors import InputError
from tools.inspect.audit import NUM_NAMED, main
from trainer.ledger import audit as ledger


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for stage in ("align", "lora"):
        (tmp_path / stage / "ledger").mkdir(parents=True)
    return tmp_path


def accounts(monkeypatch: pytest.MonkeyPatch, **lost: list[Any]) -> list[str]:
    """Each stage's account is clean but for the draws that it lost; the stages that were audited."""
    audited: list[str] = []

    def audit(directory: Path) -> Any:
        audited.append(directory.name)
        return ledger.Account(
            checkpoint="step_2",
            num_batches=2,
            num_steps=2,
            num_restarts=1,
            draws={},
            lost=lost.get(directory.name, []),
            repeated=[],
            missing_batches=[],
        )

    monkeypatch.setattr(ledger, "audit", audit)
    return audited


def test_all_stages_are_audited_or_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audited = accounts(monkeypatch)
    assert main([str(run)]) == 0
    assert main([str(run), "--stage", "lora"]) == 0
    assert audited == ["align", "lora", "lora"]
    assert json.loads((run / "lora" / "audit.json").read_text())["clean"] is True


def test_one_lost_sample_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accounts(monkeypatch, align=[(0, number) for number in range(NUM_NAMED + 5)])
    assert main([str(run)]) == 1
    printed = capsys.readouterr().out
    assert "NOT CLEAN" in printed
    assert f"(0, {NUM_NAMED - 1})" in printed
    assert f"(0, {NUM_NAMED})" not in printed, "a long list is not written out"
    assert json.loads((run / "align" / "audit.json").read_text())["lost"] == NUM_NAMED + 5


def test_a_stage_or_a_directory_without_a_ledger_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--stage: name one of align, lora$"):
        main([str(run), "--stage", "pretrain"])
    with pytest.raises(InputError, match="no stage with a ledger here; give the directory"):
        main([str(tmp_path / "nowhere")])
