"""Every command that README, docs, the Makefile and Slurm scripts name answers --help, at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from models.common.errors import InputError
from tests.support.paths import REPOSITORY
from tools.cli import VERBS, dispatch

DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "slurm").glob("*.sh")),
]
ROOTS = r"(?:tools|eval|trainer)"

HELP = """
import os, runpy, sys
import numpy, PIL.Image, pydantic, yaml  # what most commands need, imported once

for module in sys.argv[1:]:
    sys.stdout.flush()
    if os.fork():
        code = os.waitstatus_to_exitcode(os.wait()[1])
        print(f"\\nEND {module} {code}")
        continue
    sys.argv, code = [module, "--help"], 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    print("HEAVY", *sorted({"torch", "transformers", "deepspeed"} & set(sys.modules)))
    sys.stdout.flush()
    os._exit(code)
"""


def documented_modules() -> list[str]:
    """What stands behind `python -m`; `tools.bench.*` is every benchmark of the Makefile."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    return sorted(set(re.findall(rf"python3?\)? -m ({ROOTS}(?:\.\w+)+)", text)))


def documented_verbs() -> list[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    return sorted(set(re.findall(r"(?:^ *|`)sightline ([a-z]+)", text, re.MULTILINE)))


MODULES = [*documented_modules(), "tools.cli"]


@pytest.fixture(scope="module")
def helped() -> dict[str, tuple[int, str]]:
    """Exit code and output of each command, in a process that has imported nothing of ours before."""
    command = [sys.executable, "-c", HELP, *MODULES]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    pieces = re.split(r"\nEND (\S+) (-?\d+)\n", done.stdout)
    return {
        module: (int(code), text) for text, module, code in zip(*(pieces[start::3] for start in range(3)), strict=False)
    }


@pytest.mark.parametrize("module", MODULES)
def test_a_documented_module_answers_help_without_torch(module: str, helped: dict[str, tuple[int, str]]) -> None:
    code, text = helped[module]
    assert code == 0, text
    assert text.startswith("usage: ")
    assert text.rstrip().endswith("HEAVY")


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_answers_help(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sightline"])
    with pytest.raises(SystemExit) as end:
        dispatch([verb, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_every_verb_that_a_document_names_is_there() -> None:
    assert {"serve", "demo", "preflight", "audit", "replay", "toy"} <= set(documented_verbs())
    assert set(documented_verbs()) <= set(VERBS)


def test_the_list_of_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch([]) == 2
    assert dispatch(["--help"]) == 0
    assert "python -m tools.export.merge" in capsys.readouterr().out
    with pytest.raises(InputError, match="sightline meger: no such verb; there are train, "):
        dispatch(["meger"])


def test_the_console_script_of_the_package_is_this_one() -> None:
    assert "sightline=sightline_packages:main" in (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    assert Path(REPOSITORY / "tools" / "cli.py").is_file()
