"""`sightline versions`: the versions of everything that decides about numbers, and the ranges that they must be in.

    this project's requirements (its installed metadata) --+--> one line a library: installed, range, whether it fits
    what is installed -------------------------------------+

Exit code 0 where everything fits, 2 where something does not: for the head of a bug report and of a job script.
"""

from __future__ import annotations

import argparse
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from models.common.errors import InputError
from sightline_packages import VERSION


@dataclass(frozen=True)
class Library:
    """A library that this project requires."""

    name: str
    allowed: str
    """The range, as in `>=0.19,<0.20`; "" for any."""
    installed: str | None

    @property
    def fits(self) -> bool:
        """Whether it is installed in a version of the range; versions between releases count as releases do."""
        from packaging.specifiers import SpecifierSet

        return self.installed is not None and SpecifierSet(self.allowed).contains(self.installed, prereleases=True)


def main(argv: list[str]) -> int:
    """Print the versions; 0 where all of them fit."""
    argparse.ArgumentParser(prog="python -m tools.versions", description=(__doc__ or "").splitlines()[0]).parse_args(
        argv
    )
    print(f"sightline {VERSION}, Python {platform.python_version()}, {platform.platform()}, {describe_device()}")
    libraries = list(required_libraries())
    for library in libraries:
        verdict = "" if library.fits else f"   needs {library.allowed or 'any version'}"
        print(f"  {library.name:18s} {library.installed or 'missing':16s} {library.allowed:16s}{verdict}".rstrip())
    misfits = [library for library in libraries if not library.fits]
    if misfits:
        wanted = " ".join(f"'{library.name}{library.allowed}'" for library in misfits)
        raise InputError(f"{len(misfits)} of {len(libraries)} libraries do not fit; pip install {wanted}")
    return 0


def required_libraries() -> Iterator[Library]:
    """What this project requires, in the order of its metadata.

    Raises:
        InputError: the project is not installed, so that nothing says what it requires.
    """
    try:
        requirements = metadata.requires("sightline") or []
    except metadata.PackageNotFoundError:
        raise InputError("sightline is not installed here; pip install --editable . in its checkout") from None
    for line in requirements:
        found = re.fullmatch(r"([\w.-]+)\s*([^;]*)", line)  # behind ";" stand extras, which nobody needs
        if found is not None:
            name, allowed = found[1], found[2].strip("() ")
            try:
                installed: str | None = metadata.version(name)
            except metadata.PackageNotFoundError:
                installed = None
            yield Library(name, allowed, installed)


def describe_device() -> str:
    """The accelerator that torch sees, and its CUDA; "no GPU" without one."""
    import torch

    if not torch.cuda.is_available():
        return "no GPU"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
