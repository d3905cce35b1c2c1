"""`python -m tools.dev.gpu_tests [--wheels DIR]`: the tests that only a machine with a GPU can run.

Needs torch and pytest of the machine, no network, and no environment of ours: what the machine lacks comes as wheels,
into a folder for this run alone. On one device everything takes under 10 minutes; `--multi` is for several.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from models.common.errors import InputError, run_cli

TESTS = Path(__file__).resolve().parents[2] / "tests"


def main(argv: list[str]) -> int:
    """Run them; the code of pytest."""
    parser = argparse.ArgumentParser(prog="python -m tools.dev.gpu_tests", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install for this run alone")
    parser.add_argument("--multi", action="store_true", help="those for several devices")
    parser.add_argument("--collect", action="store_true", help="only list them")
    arguments, more = parser.parse_known_args(argv)
    if not TESTS.is_dir():
        raise InputError(f"{TESTS}: the tests are not there; run this in a checkout")
    environment = {**os.environ, "DS_ACCELERATOR": "cuda"}
    if arguments.wheels is not None:
        from tools.dev.bench.gpu import install

        install(arguments.wheels)
        environment["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])
    marks = "gpu and multi" if arguments.multi else "gpu and not multi"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, *files_with_marks()]
    command += ["--collect-only"] if arguments.collect else []
    return subprocess.run([*command, *more], env=environment, cwd=TESTS.parent, check=False).returncode


def files_with_marks() -> list[str]:
    """The test files that name a device's mark, and those of tests/gpu, which all have it.

    To collect all files takes 10 to 20 seconds of a machine that may be lent by the minute.
    """
    files = sorted(TESTS.rglob("test_*.py"))
    return [str(file) for file in files if file.parent == TESTS / "gpu" or "mark.gpu" in file.read_text("utf-8")]


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
