"""A table of addresses and captions -> shards of images, by img2dataset.

Owns the call, and the optional separate environment of img2dataset: it needs webdataset 0.2, ours is 1.0, so
the two cannot share one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from models.common.errors import InputError

REQUIREMENT = "img2dataset==1.47.0"
_READY = ".ready"
"""In an environment: everything is installed."""

_OPTIONS = {
    "input_format": "tsv",
    "url_col": "url",
    "caption_col": "caption",
    "output_format": "webdataset",
    # The longer side at 512, as JPEGs: enough for a 336-pixel encoder, at a tenth of the bytes.
    "resize_mode": "keep_ratio_largest",
    "resize_only_if_bigger": True,
    "image_size": 512,
}


def fetch_images(table: Path, jobs: int, environment: Path | None = None) -> None:
    """Run img2dataset on a table, into `shards` beside it; it resumes an earlier run.

    Args:
        environment: a virtual environment that holds img2dataset, made first where there is none.

    Raises:
        InputError: it is not installed and cannot be, or it failed.
    """
    program = find_program() if environment is None else make_environment(environment)
    if program is None:
        raise InputError(
            f"{table} is there, its images are not: img2dataset is missing, which needs an older webdataset than"
            " ours; run the same command again with --img2dataset-env DIR, which makes it an environment of its own"
        )
    options = _OPTIONS | {"url_list": table, "output_folder": table.parent / "shards", "processes_count": jobs}
    command = [str(program), *(f"--{name}={value}" for name, value in options.items())]
    print(" ".join(command), flush=True)
    if (code := subprocess.run(command, check=False).returncode) != 0:
        raise InputError(f"img2dataset ended with {code}; run the same command again and it goes on")


def find_program() -> Path | None:
    """The img2dataset next to this Python or on the PATH."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    program = shutil.which("img2dataset", path=places)
    return Path(program) if program is not None else None


def make_environment(folder: Path) -> Path:
    """img2dataset in a virtual environment of its own, installed by pip if missing; returns its program.

    Raises:
        InputError: the folder holds something else, or pip failed.
    """
    program, mark = folder / "bin" / "img2dataset", folder / _READY
    if mark.is_file():
        return program
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        raise InputError(f"--img2dataset-env {folder} is no virtual environment: name a directory that does not exist")
    print(f"{folder}: installing {REQUIREMENT} (once, some minutes)", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", REQUIREMENT]
    if (code := subprocess.run(pip, check=False).returncode) != 0:
        raise InputError(f"pip ended with {code}: {REQUIREMENT} is not installed in {folder}; see what it said above")
    mark.touch()
    return program
