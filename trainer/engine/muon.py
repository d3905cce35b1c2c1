"""DeepSpeed's Muon, imported without torch's compiler.

DeepSpeed 0.19 asks whether an optimizer is its Muon (zero/utils.py, stage_1_and_2.py, stage3.py). To ask, it imports
zero/muon/original_muon.py, which hands three functions to `torch.compile`, and that imports the compiler: a second of
every rank's start, for an optimizer that is not used here.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module

from deepspeed.runtime import compiler


def import_muon_as_written() -> None:
    """Import its functions as they are written, unless they are imported already. What they compute is the same."""
    before = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        with suppress(ImportError):  # another version of DeepSpeed
            import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = before
