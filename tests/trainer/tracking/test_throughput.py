"""Rates since the last line, whatever else took time between two of them."""

from __future__ import annotations

import pytest

from models.shapes import Counts
from trainer.tracking import throughput
from trainer.tracking.throughput import ThroughputMeter


def test_what_a_measurement_took_counts_for_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows were waited for before a measurement of 5 seconds, and the step came after it."""
    now = 100.0
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now)
    meter = ThroughputMeter(["language"], None, num_devices=1, peak=None)
    now += 3.0  # the rows
    now += 5.0  # the measurement
    meter.leave_out(5.0)
    now += 1.0  # the step
    meter.add(Counts(40, 10, 0, 0, 0), num_samples=4, num_positions=50, num_images=0, wait_s=3.0)
    read = meter.read(norm=1.0, squared_norms=[1.0], learning_rates=[0.1])
    assert read["data_wait_share"] == pytest.approx(0.75)
    assert read["samples_per_s"] == pytest.approx(1.0)
