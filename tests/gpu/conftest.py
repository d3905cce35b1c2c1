"""What only a device can show. `make test-gpu` runs it; without a device every test here is skipped.

On one device: `pytest -m "gpu and not multi"`, under 10 minutes. On several: `pytest -m "gpu and multi"`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TRAINS_ON = "DS_ACCELERATOR"
"""tests/conftest.py sets it to cpu, for the ranks of all other tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark and skip by what is there."""
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        needed = 2 if item.get_closest_marker("multi") is not None else 1
        if num_devices < needed:
            item.add_marker(pytest.mark.skip(reason=f"{needed} CUDA devices are needed, {num_devices} are there"))


@pytest.fixture(autouse=True)
def ranks_train_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that a test starts take the devices."""
    if os.environ.get(TRAINS_ON) == "cpu":
        monkeypatch.setenv(TRAINS_ON, "cuda")
