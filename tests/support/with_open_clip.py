"""`python -m tests.support.with_open_clip MODULE WORDS...`: runs a module where open_clip can be imported.

open_clip imports torchvision, whose wheels from PyPI are built for CUDA: beside a CPU's torch their operators are
missing, and the import fails where it describes them. Declared here, unused by open_clip, they let it through.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch

SITE = Path(__file__).resolve().parents[2] / ".venv" / "open_clip"
"""Where `make open-clip` puts open_clip and what it needs, apart from everything else."""


def environment() -> dict[str, str]:
    """The variables with which a process finds open_clip."""
    return {**os.environ, "PYTHONPATH": str(SITE)}


def declare_operators() -> torch.library.Library | None:
    """Let torchvision be imported where its operators cannot be loaded; the library must be kept."""
    try:
        import torchvision  # noqa: F401

        return None
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


if __name__ == "__main__":
    kept = declare_operators()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
