"""How long a test waits: until something is so. The only bound guards against waiting for ever.

No claim is measured by the bound: on a machine with other work beside it everything may take ten times as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable

GUARD_S = 600.0


def wait_until(what: str, is_so: Callable[[], object], every_s: float = 0.02) -> None:
    """Ask until the answer is yes; AssertionError naming `what` where it does not come about."""
    end_s = time.monotonic() + GUARD_S
    while not is_so():
        assert time.monotonic() < end_s, f"not within {GUARD_S:.0f} s: {what}"
        time.sleep(every_s)
