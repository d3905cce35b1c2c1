"""`sightline ledger` prints the lines of both forms, each with its restart and rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.common.errors import InputError
from tools.inspect.ledger import main
from trainer.ledger.blocks import block_of_lines

LINES = [{"batch": batch, "step": batch, "draws": [[0, batch - 1]], "left_out": []} for batch in (1, 2, 3)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for number in (1, 2):
        (tmp_path / "align" / "ledger" / f"attempt_{number:04d}").mkdir(parents=True)
    first, second = sorted((tmp_path / "align" / "ledger").iterdir())
    (first / "rank_00000.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in LINES[:2]))
    (second / "rank_00001.blocks").write_bytes(block_of_lines(LINES[1:]).to_bytes())
    return tmp_path


def test_lines_of_both_forms_are_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    whose = [(1, 0, LINES[0]), (1, 0, LINES[1]), (2, 1, LINES[1]), (2, 1, LINES[2])]
    assert printed == [{**line, "attempt": attempt, "rank": rank} for attempt, rank, line in whose]
    assert main([str(run), "--stage", "align", "--batch", "3"]) == 0
    assert json.loads(capsys.readouterr().out) == {**LINES[2], "attempt": 2, "rank": 1}


def test_a_stage_without_a_ledger_is_named(run: Path) -> None:
    with pytest.raises(InputError, match="--stage: name one of align"):
        main([str(run), "--stage", "lora"])
