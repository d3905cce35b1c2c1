"""The hardware that preflight is asked about. Values only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """The job's hardware, and the assumptions about it."""

    num_gpus: int
    gpu_bytes: float
    device: str
    peak_share: float
    num_samples: int
    with_numerics: bool = False
    """Whether gradients are computed here, in the stage's precision and in fp32."""
