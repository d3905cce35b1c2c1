"""How many random cases a test draws: enough to see a fault that is common in `make test`, many more in `make fuzz`."""

from __future__ import annotations

import os


def num_cases(few: int, many: int) -> int:
    """`many` under `make fuzz`. A test that asks is marked `fuzz`, and states what holds for either number."""
    return many if os.environ.get("SIGHTLINE_FUZZ") else few
