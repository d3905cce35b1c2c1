"""The five packages of this project have common names: says in a line where another project hides one of ours.

Nothing of ours can be imported from here but the standard library: which package is whose is the question. Each package
that commands run from calls `check` when it is imported, and the `sightline` command begins here.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

VERSION = "0.2.0.dev0"
"""The version of all of it; setup.py, `sightline.__version__` and the documentation read it here."""

PACKAGES = ("trainer", "models", "data_pipeline", "eval", "tools")


class PackageClashError(ImportError):
    """Another project's package is found in place of one of ours; the message is one line with both places."""


def main() -> int:
    """Entry point of the console command."""
    check()
    from tools.cli import main as run

    return run()


def check() -> None:
    """Look where Python finds the five packages.

    Raises:
        PackageClashError: another project's comes first; as a command's exit code 2 and one line on stderr.
    """
    line = clash(Path(__file__).resolve().parent)
    if line is None:
        return
    # "-m": Python looks for the module of `python -m` right now, and imports the packages above it first.
    if sys.argv[:1] == ["-m"] or Path(sys.argv[0] if sys.argv else "").stem == "sightline":
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2)
    raise PackageClashError(line)


def clash(home: Path) -> str | None:
    """What hides one of the packages in `home`, and what to do; None where nothing does."""
    for name in PACKAGES:
        spec = find_spec(name)
        found = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec is not None else []
        if spec is not None and spec.origin is not None and not found:
            found = [Path(spec.origin).resolve()]
        if found and home / name not in found:
            return (
                f"the package `{name}` of another project at {found[0]} hides Sightline's at {home / name}; take "
                f"{found[0].parent} off PYTHONPATH, or start in another directory"
            )
    return None
