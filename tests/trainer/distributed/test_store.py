"""The store in which ranks meet."""

from __future__ import annotations

import threading

import pytest
from torch.distributed import DistNetworkError

from models.common.errors import InputError
from trainer.distributed.context import DistributedContext
from trainer.distributed.store import in_time, join_store


@pytest.mark.parametrize("port", ["", "0", "70000", "http"])
def test_no_port_is_one_line(port: str) -> None:
    with pytest.raises(InputError, match="no address and port at which the ranks can meet"):
        join_store(DistributedContext(1, 2), "run", 1.0, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})


def test_a_call_has_its_value_or_its_error_or_its_limit() -> None:
    assert in_time(lambda: 3, 60.0) == 3
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 // 0, 60.0)
    never = threading.Event()
    with pytest.raises(DistNetworkError, match="has not answered within 0 s"):
        in_time(never.wait, 0.05)
    never.set()
