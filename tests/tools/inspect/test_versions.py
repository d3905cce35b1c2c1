"""What is installed beside the ranges that are allowed."""

from __future__ import annotations

from importlib import metadata

import pytest

from models.common.errors import InputError
from tools.inspect import versions
from tools.inspect.versions import Library, main, required_libraries


def test_this_environment_fits_and_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("sightline ")
    assert {"torch", "deepspeed", "transformers"} <= {line.split()[0] for line in lines}
    assert f"deepspeed          {metadata.version('deepspeed')}" in "\n".join(lines)


def test_libraries_with_private_parts_have_an_upper_bound() -> None:
    allowed = {library.name: library.allowed for library in required_libraries()}
    for name in ("deepspeed", "torch", "transformers", "peft", "bitsandbytes"):
        assert "<" in allowed[name], name


@pytest.mark.parametrize(
    ("installed", "fits"), [("0.19.0", True), ("0.19.8", True), ("0.20.0", False), ("0.18.9", False), (None, False)]
)
def test_a_version_fits_its_range(installed: str | None, fits: bool) -> None:
    assert Library("deepspeed", ">=0.19,<0.20", installed).fits is fits


def test_what_does_not_fit_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = [Library("torch", ">=2.11,<2.14", "2.13.0"), Library("deepspeed", ">=0.19,<0.20", "0.21.0")]
    monkeypatch.setattr(versions, "required_libraries", lambda: iter(libraries))
    with pytest.raises(InputError, match=r"1 of 2 libraries do not fit; pip install 'deepspeed>=0\.19,<0\.20'"):
        main([])
