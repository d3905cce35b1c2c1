"""The lowest versions that setup.py allows, as constraints on stdout: `make test-versions SET=lowest` tests them.

setup.py's ranges in the installed metadata  ->  name==lower bound, a line each
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence

from packaging.specifiers import SpecifierSet

from models.common.errors import InputError, run_cli
from tools.inspect.versions import required_libraries


def lowest(ranges: Iterable[tuple[str, str]], keep: Sequence[str]) -> Iterator[str]:
    """Constraint lines: each library at its lower bound, or as `keep` says; those without a bound are left out.

    Args:
        ranges: (name, range), such as ("torch", ">=2.11,<2.14").
        keep: "name==version" of libraries of which another version is tested.
    """
    kept = {line.partition("==")[0]: line for line in keep}
    for name, allowed in ranges:
        bound = next((each.version for each in SpecifierSet(allowed) if each.operator == ">="), None)
        if name in kept:
            yield kept[name]
        elif bound is not None:
            yield f"{name}=={bound}"


def main(argv: list[str]) -> int:
    """Print the constraints."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.dev.version_set", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--keep", action="append", default=[], metavar="NAME==VERSION", help="test this version instead"
    )
    asked = parser.parse_args(argv)
    unclear = [line for line in asked.keep if "==" not in line]
    if unclear:
        raise InputError(f"--keep {unclear[0]}: not NAME==VERSION")
    print("\n".join(lowest(((library.name, library.allowed) for library in required_libraries()), asked.keep)))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
