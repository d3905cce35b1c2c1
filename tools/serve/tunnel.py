"""A public address through gradio.live, for `sightline demo --share`: Gradio's own tunnel to our port."""

from __future__ import annotations

import secrets

from models.common.errors import AwayError, single_line


def share(host: str, port: int) -> str:
    """Open the tunnel and return its address; it ends with the process.

    Raises:
        AwayError: the service is not reached.
    """
    from gradio.networking import setup_tunnel

    try:
        address = setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # httpx's, OSError and its own, in any mixture
        raise AwayError(f"--share: gradio.live is not reached: {single_line(error)}") from error
    return "https://" + str(address).partition("://")[2]
