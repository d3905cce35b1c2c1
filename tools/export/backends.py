"""How far the pixels of transformers' other image backend are from those of training.

An image processor is opened with Pillow, as in training (`models.opening.open_processor`). Where torchvision is
installed, transformers takes that unless it is told otherwise. The parity report states how far its pixels are, without
a bound: neither training nor anything of this project sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from models.bundle import Check
from models.common.errors import single_line
from models.opening import open_processor
from tools.export.golden import Probe
from tools.export.parity import pixel_difference, stock_inputs


def torchvision_check(directory: Path, probes: Sequence[Probe]) -> Check:
    """The largest difference between torchvision's pixels and Pillow's over the probes; `note`: why it is not known."""
    name = "largest pixel difference with torchvision"
    if find_spec("torchvision") is None:
        return Check(name=name, value=0.0, bound=None, passed=True, note="not tried, torchvision is not installed")
    try:
        processors = [open_processor(directory, backend) for backend in ("pil", "torchvision")]
        pixels = [
            tuple(stock_inputs(processor, probe)["pixel_values"].flatten(0, -4) for probe in probes)
            for processor in processors
        ]
    except Exception as error:  # whatever it raises there, nothing of this project needs it
        return Check(name=name, value=0.0, bound=None, passed=True, note=f"not known: {single_line(error)}")
    difference = pixel_difference(pixels[0], pixels[1])
    return Check(name=f"{name} {version('torchvision')}", value=difference, bound=None, passed=True)
