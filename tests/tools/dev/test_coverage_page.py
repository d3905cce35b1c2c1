"""The page says what was measured, keeps the reasons that were written into it, and asks for those that are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.common.errors import run_cli
from tools.dev.coverage_page import MISSING, main, read_reasons


def measured(file: Path, **reached: tuple[int, int]) -> Path:
    files = {
        f"{name.replace('__', '/')}.py": {"summary": {"num_statements": lines, "covered_lines": hit}}
        for name, (hit, lines) in reached.items()
    }
    file.write_text(json.dumps({"files": files}))
    return file


def test_a_module_without_a_reason_is_named_and_a_reason_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "coverage.md"
    report = measured(
        tmp_path / "c.json", models__a=(79, 100), models__b=(80, 100), trainer__c=(0, 1200), eval__d=(0, 0)
    )
    assert main([str(report), "--page", str(page)]) == 1
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["models/a.py", "trainer/c.py"]
    text = page.read_text()
    assert "| models | 2 | 200 | 79 % |" in text
    assert "| all | 4 | 1,400 | 11 % |" in text
    assert read_reasons(text) == {"models/a.py": MISSING, "trainer/c.py": MISSING}

    written = text.replace(f"79 % | {MISSING}", "79 % | needs a GPU").replace(f"0 % | {MISSING}", "0 % | slow, `x`")
    page.write_text(written)
    assert main([str(report), "--page", str(page)]) == 0
    assert read_reasons(page.read_text()) == {"models/a.py": "needs a GPU", "trainer/c.py": "slow, `x`"}

    better = measured(tmp_path / "c.json", models__a=(100, 100), trainer__c=(0, 1200))
    assert main([str(better), "--page", str(page)]) == 0
    assert read_reasons(page.read_text()) == {"trainer/c.py": "slow, `x`"}


@pytest.mark.parametrize(("text", "said"), [("{}", "files"), ('{"files": {}}', "names no module"), ("[", "c.json")])
def test_another_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    (tmp_path / "c.json").write_text(text)
    assert run_cli(main, [str(tmp_path / "c.json"), "--page", str(tmp_path / "page.md")]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "page.md").exists()
