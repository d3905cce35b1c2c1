"""The decoding benchmark over a drawn model, which needs no bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.common.errors import InputError
from tools.dev.bench.decode import main


@pytest.mark.slow
def test_a_drawn_model_is_decoded_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--drawn", "tiny", "--to", "bf16", "--device", "cpu", "--tokens", "4", "--rounds", "1"]) == 0
    assert "share of the bytes' floor" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["bundle", "--drawn", "tiny"]], ids=str)
def test_one_of_bundle_and_shape_is_given(arguments: list[str]) -> None:
    with pytest.raises(InputError, match="give a BUNDLE, or a shape by --drawn"):
        main(arguments)
