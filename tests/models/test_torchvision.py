"""A torchvision that does not fit torch is one line, wherever a model or a bundle is first looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from models.common.errors import InputError
from models.common.torchvision import check_torchvision
from tests.support.outside import write_entry_points
from tests.support.paths import REPOSITORY


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A directory of the import path with a torchvision as it is beside a torch that it was not built for."""
    site = tmp_path / "site"
    write_entry_points(site, "torchvision", {})
    (site / "torchvision").mkdir()
    (site / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    return site


def test_the_versions_and_what_to_do_are_said(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(broken)
    with pytest.raises(InputError, match=r"torchvision 1\.0 does not work with torch 2.*nms does not exist.*uninstall"):
        check_torchvision()


@pytest.mark.slow
def test_a_command_that_opens_a_bundle_says_it(broken: Path, tmp_path: Path) -> None:
    from tests.support.bundles import make_bundle

    bundle = make_bundle(tmp_path / "bundle")
    program = f"import sys; sys.path.insert(0, {str(broken)!r}); from tools.cli import main; raise SystemExit(main())"
    words = [sys.executable, "-c", program, "quantize", str(bundle), str(tmp_path / "out")]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: torchvision 1.0 does not work with torch 2")
    assert "Traceback" not in done.stderr
