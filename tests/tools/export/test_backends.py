"""The parity report states the pixels of both of transformers' image backends, with torchvision and without it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from models.bundle import Check, verify
from models.opening import open_processor
from tests.support.bundles import image
from tests.tools.conftest import beside
from tools.export.backends import torchvision_check
from tools.export.golden import Probe, drawn

NAME = "largest pixel difference with torchvision"
IS_INSTALLED = find_spec("torchvision") is not None


def checks_of(bundle: Path) -> dict[str, Check]:
    return {check.name: check for check in verify(bundle).parity.checks}


@pytest.mark.skipif(IS_INSTALLED, reason="torchvision is installed")
def test_without_torchvision_the_report_says_so(trained: dict[str, Any]) -> None:
    checks = checks_of(beside(trained, "bundle"))
    assert checks["largest pixel difference"].note == f"Pillow {version('pillow')}"
    assert (checks[NAME].note, checks[NAME].bound) == ("not tried, torchvision is not installed", None)


@pytest.mark.skipif(not IS_INSTALLED, reason="torchvision is not installed")
def test_with_torchvision_the_report_says_how_far_it_is(trained: dict[str, Any]) -> None:
    checks = checks_of(beside(trained, "bundle"))
    assert checks["largest pixel difference"].value == 0.0
    check = checks[f"{NAME} {version('torchvision')}"]
    assert (check.bound, check.note) == (None, "")
    assert 0 < check.value < 0.2, "some levels of 255, of pixels whose deviation is about a quarter of that"


def as_if_installed(monkeypatch: pytest.MonkeyPatch, opened: Callable[[Path, str], Any]) -> None:
    """`opened` gives the processor of each backend."""
    monkeypatch.setattr("tools.export.backends.find_spec", lambda _: "found")
    monkeypatch.setattr("tools.export.backends.version", lambda _: "0.1")
    monkeypatch.setattr("tools.export.backends.open_processor", opened)


def test_the_difference_is_that_of_the_pixels(trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(directory: Path, backend: str) -> Any:
        processor = open_processor(directory)
        processor.image_processor.image_mean = [0.5 if backend == "pil" else 0.25] * 3
        processor.image_processor.image_std = [1.0] * 3
        return processor

    as_if_installed(monkeypatch, opened)
    square = Probe(image(), "What is it?", "A circle.")  # what is not square is padded by the mean, in levels
    check = torchvision_check(beside(trained, "bundle"), [square])
    assert (check.name, check.bound, check.passed) == (f"{NAME} 0.1", None, True)
    assert check.value == pytest.approx(0.25)


def test_a_torchvision_that_does_not_work_is_no_fault_of_the_bundle(
    trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(directory: Path, backend: str) -> Any:
        if backend == "pil":
            return open_processor(directory)
        raise RuntimeError("operator torchvision::nms does not exist")

    as_if_installed(monkeypatch, opened)
    check = torchvision_check(beside(trained, "bundle"), drawn(1))
    assert (check.bound, check.passed) == (None, True)
    assert check.note == "not known: operator torchvision::nms does not exist"
