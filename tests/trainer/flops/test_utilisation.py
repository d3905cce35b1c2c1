"""The share of a device's peak, part by part; none where the peak is not known."""

from __future__ import annotations

import pytest

from models.shapes import PartFlops
from trainer.flops.utilisation import peak_flops, utilisation


def test_utilisation_is_split_and_absent_without_a_peak() -> None:
    parts = {"vision": PartFlops(1e12), "projector": PartFlops(0.0, 1e11, 1e11), "language": PartFlops(2e12, 2e12)}
    found = utilisation(parts, 2.0, peak=peak_flops("NVIDIA A100-SXM4-80GB"), num_devices=2)
    assert found["mfu"] == pytest.approx(5.2e12 / (2 * 2 * 312e12))
    assert found["mfu"] == pytest.approx(found["mfu/vision"] + found["mfu/projector"] + found["mfu/language"])
    assert utilisation(parts, 2.0, peak=peak_flops("AMD EPYC 7763"), num_devices=2) == {}
    assert peak_flops("NVIDIA A10G") is None
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
