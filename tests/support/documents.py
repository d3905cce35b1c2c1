"""The commands that README and docs print, as a person would type them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.paths import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PROGRAMS = ("python -m ", "sightline ", "deepspeed ", "sbatch ", "make ")


def commands(page: Path) -> list[str]:
    """Commands in code blocks, and those between backticks that are whole commands; comments are left out."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    # A fence's backticks would pair with those of the text behind it.
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    quoted = [" ".join(each.split()) for each in re.findall(r"`([^`]+)`", prose)]
    found = [
        re.split(r"\s+#\s", line.removeprefix("$ "))[0].strip()
        for line in [*lines, *quoted]
        if line.startswith(PROGRAMS) and " " in line
    ]
    return [
        " ".join(line.split()) for line in dict.fromkeys(found) if "`" not in line and not line.endswith((".", ","))
    ]


def commands_of(name: str, *beginnings: str) -> list[str]:
    """The commands of one page that begin so, in order."""
    return [line for line in commands(REPOSITORY / name) if line.startswith(beginnings)]


def opening_lines() -> str:
    """The program of docs/bundle.md that opens a bundle without this project."""
    page = (REPOSITORY / "docs" / "bundle.md").read_text(encoding="utf-8")
    return next(block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "sys.argv" in block)
