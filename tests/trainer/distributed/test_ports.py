"""A port that ranks are told before they listen must still be theirs when they do."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from trainer.distributed import ports
from trainer.distributed.ports import PORTS, choose_port


def test_a_chosen_port_is_not_handed_to_outgoing_connections() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    assert all(port in PORTS and port < first for port in (choose_port() for _ in range(20)))


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", choose_port()))
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "PORTS", range(port, port + 1))
        with pytest.raises(OSError, match=f"no free port from {port} to {port}"):
            choose_port()
