"""DeepSpeed's question whether an optimizer is its Muon imports no compiler."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from tests.support.ranks import run_on_ranks
from trainer.engine.muon import import_muon_as_written


def asked(ranks: Any) -> tuple[int, int]:
    """How often torch.compile is called by what DeepSpeed imports, and by the next that asks for it."""
    from deepspeed.runtime import compiler

    del ranks
    with patch("torch.compile") as compiling:
        import_muon_as_written()
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # noqa: F401 - as zero/utils.py does

        before = compiling.call_count
        compiler.compile()(torch.relu)
        return before, compiling.call_count


def test_nothing_is_compiled_until_somebody_else_asks() -> None:
    assert run_on_ranks(1, asked) == [(0, 1)]
