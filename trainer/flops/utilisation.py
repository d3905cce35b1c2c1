"""The share of a device's peak that needed FLOPs make (MFU; Chowdhery et al. 2022, PaLM, appendix B)."""

from __future__ import annotations

import re

from models.shapes import PartFlops

PEAKS: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 FLOP/s by parts of the device's name; the first match counts. From NVIDIA's data sheets; where they print
the figure with sparsity, half of it. GeForce: with fp32 accumulation (Ada and Ampere GA102 white papers).
"""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name (`torch.cuda.get_device_name`); None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


def utilisation(
    parts: dict[str, PartFlops], seconds: float, *, peak: float | None, num_devices: int
) -> dict[str, float]:
    """Needed FLOPs of `seconds` as a share of the peak (MFU): in total, and by part.

    Empty where the peak is not known (a CPU, an unknown device).
    """
    if peak is None or seconds <= 0:
        return {}
    possible = seconds * peak * num_devices
    shares = {f"mfu/{part}": flops.total / possible for part, flops in parts.items()}
    return {"mfu": sum(shares.values()), **shares}
