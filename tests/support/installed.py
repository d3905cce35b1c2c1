"""The project installed as a user installs it: `pip install .`, not editable, away from the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sightline_packages import PACKAGES
from tests.support.paths import REPOSITORY

FILES = (*PACKAGES, "ds_configs", "recipes", "setup.py", "pyproject.toml", "sightline.py", "sightline_packages.py")


def copy_sources(target: Path) -> Path:
    """What pip builds from, so that no build directory is left in the checkout."""
    target.mkdir()
    for name in FILES:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(REPOSITORY / name, target / name)
    return target


def build_wheel(folder: Path) -> Path:
    """The project's wheel in `folder`; nothing is left of what it was built from."""
    with TemporaryDirectory() as temporary:
        source = copy_sources(Path(temporary) / "source")
        words = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
        _pip(*words, str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(python: str, wheel: Path) -> None:
    """Install a wheel alone into the environment of `python`, by this environment's pip."""
    _pip("--python", python, "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", str(wheel))


def _pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _empty_environment(folder: Path) -> tuple[Path, Path]:
    """The interpreter of a new environment, and where its packages lie."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    return folder / "bin" / "python", site


def environment_of(folder: Path, *packages: str) -> Path:
    """The interpreter of a new environment with these packages and what they require, as pip would find it there.

    Each file is a link into this environment, whose versions were tested together: the same files without unpacking
    hundreds of megabytes.
    """
    python, site = _empty_environment(folder)
    wanted, linked = list(packages), set[str]()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in linked:
            continue
        linked.add(name)
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / top).is_symlink():
                (site / top).symlink_to(str(found.locate_file(top)))
        required = [Requirement(line) for line in found.requires or ()]
        wanted += [each.name for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    return python


def fresh_environment(folder: Path, wheel: Path) -> Path:
    """The interpreter of a new environment with the project in it; of this one it has the libraries alone.

    A `.pth` file adds their directory to the path. What is installed in there in editable form is not seen: of a
    directory that is added so, Python reads no `.pth` files.
    """
    python, site = _empty_environment(folder)
    libraries = Path(sys.executable).parents[1] / site.relative_to(folder)
    (site / "libraries.pth").write_text(f"{libraries}\n")
    install(str(python), wheel)
    return python
