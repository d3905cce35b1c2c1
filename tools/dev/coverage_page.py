"""docs/coverage.md out of coverage's JSON: `make coverage`.

    build/coverage.json + the reasons in docs/coverage.md  ->  docs/coverage.md, with date and commit

Owns the page. The reasons are a maintainer's: they stay as they are written in the page's last table, and a module
below the bound that has none there is an error.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

from models.common.documents import read_value, understanding
from models.common.errors import InputError, run_cli
from models.common.files import write_text

LEAST = 0.8
"""A module that is reached less has its reason in the page."""
MISSING = "(say why)"

_ROW = re.compile(r"^\| `(?P<module>[\w/.]+)` \| [\d,]+ \| \d+ % \| (?P<reason>.+) \|$", re.MULTILINE)

_PAGE = """\
# Coverage

`make coverage` runs the tests of `make test-fast`, counts which lines they reach, also in processes that they start,
and writes this page. The reasons in the last table are written by hand; the command ends with 1 where one is missing.
What `make test` runs beyond those (tests marked `slow`, all on a real Slurm among them) and on a GPU is not counted.
Last run: {date}, commit {commit}, Python {python}.

| package | modules | lines | reached |
|---|---|---|---|
{packages}

Modules of which less than {least} is reached:

| module | lines | reached | why |
|---|---|---|---|
{below}
"""


@dataclass(frozen=True)
class Module:
    """A file of ours, and how much of it was reached."""

    file: str
    num_lines: int
    num_reached: int

    @property
    def share(self) -> float:
        """Of its statements; 1 where it has none."""
        return self.num_reached / self.num_lines if self.num_lines else 1.0


def main(argv: list[str]) -> int:
    """Write the page; returns 1 where a module below the bound has no reason in it."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.dev.coverage_page", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("measured", type=Path, metavar="COVERAGE.json", help="what `coverage json` has written")
    parser.add_argument("--page", type=Path, default=Path("docs/coverage.md"))
    asked = parser.parse_args(argv)
    modules = read_modules(read_value(asked.measured), asked.measured)
    reasons = read_reasons(asked.page.read_text(encoding="utf-8")) if asked.page.is_file() else {}
    write_text(asked.page, page(modules, reasons, commit=_commit(), now=datetime.now(timezone.utc)))
    unexplained = [module.file for module in below(modules) if reasons.get(module.file, MISSING) == MISSING]
    for file in unexplained:
        print(f"{asked.page}: {file} is reached less than {percent(LEAST)}; say in the page why, or test it")
    return 1 if unexplained else 0


def read_modules(measured: Any, file: Path) -> list[Module]:
    """The modules in coverage's report, by their names.

    Raises:
        InputError: the file is no such report.
    """
    with understanding(file):
        found = [
            Module(name, each["summary"]["num_statements"], each["summary"]["covered_lines"])
            for name, each in measured["files"].items()
        ]
    if not found:
        raise InputError(f"{file}: names no module; was coverage told which packages to measure?")
    return sorted(found, key=lambda module: module.file)


def read_reasons(text: str) -> dict[str, str]:
    """Module -> why, out of a page that was written before."""
    return {row["module"]: row["reason"] for row in _ROW.finditer(text)}


def below(modules: list[Module]) -> list[Module]:
    """Those that need a reason."""
    return [module for module in modules if module.share < LEAST]


def page(modules: list[Module], reasons: Mapping[str, str], *, commit: str, now: datetime) -> str:
    """The whole page, as Markdown."""
    import platform

    low = [_row(f"`{each.file}`", each, reasons.get(each.file, MISSING)) for each in below(modules)]
    return _PAGE.format(
        date=now.date().isoformat(),
        commit=commit,
        python=platform.python_version(),
        packages="\n".join(_packages(modules)),
        least=percent(LEAST),
        below="\n".join(low),
    )


def _packages(modules: list[Module]) -> Iterator[str]:
    def package(module: Module) -> str:
        return module.file.partition("/")[0]

    for name, group in groupby(modules, key=package):
        yield _package_row(name, list(group))
    yield _package_row("all", modules)


def _package_row(name: str, modules: list[Module]) -> str:
    whole = Module(name, sum(each.num_lines for each in modules), sum(each.num_reached for each in modules))
    return f"| {name} | {len(modules):,} | {whole.num_lines:,} | {percent(whole.share)} |"


def _row(name: str, module: Module, why: str) -> str:
    return f"| {name} | {module.num_lines:,} | {percent(module.share)} | {why} |"


def percent(share: float) -> str:
    """Rounded down: 79.9 % are below 80."""
    return f"{int(100 * share)} %"


def _commit() -> str:
    """The commit that was measured, and whether files differed from it."""
    told = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
