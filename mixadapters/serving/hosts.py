"""Who can reach a server. Imports nothing that takes time."""

from __future__ import annotations

import ipaddress
import os

TOKEN = "MIXADAPTERS_TOKEN"  # of the environment: arguments are seen by everybody on the machine


def token_for(host: str) -> str | None:
    """What clients must send, if the environment says so.

    Raises:
        ValueError: others than this machine can reach the host, and there is none.
    """
    token = os.environ.get(TOKEN) or None
    if token is None and not loopback(host):
        raise ValueError(f"--host {host} is open to others: set a token in the environment, {TOKEN}")
    return token


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
