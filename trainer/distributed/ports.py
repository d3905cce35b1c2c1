"""A port at which ranks of this machine meet, for launchers that choose it before the first rank listens."""

from __future__ import annotations

import random
import socket

PORTS = range(20_000, 32_000)
"""Below what Linux hands to outgoing connections and to port 0 (net.ipv4.ip_local_port_range begins at 32768): one of
those may be gone again between the look at it and its use. slurm/launch.sh stays below it too."""

CHOOSE_ANOTHER = "choose another (deepspeed --master_port, or MASTER_PORT)"
"""What a user does where a port is taken."""


def choose_port() -> int:
    """A port of `PORTS` that nothing listens at now.

    Raises:
        OSError: none is free.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {PORTS.start} to {PORTS.stop - 1} at 127.0.0.1")
