"""Serving adapters and mixtures: requests that name what they want, and requests that choose."""

from mixadapters.serving.engine import AdapterServer
from mixadapters.serving.requests import (
    AdapterRefused,
    DeadlineExceeded,
    Request,
    RequestCancelled,
    Result,
    ServerBusy,
    ServerStopped,
    UnknownAdapter,
)

__all__ = [
    "AdapterRefused",
    "AdapterServer",
    "DeadlineExceeded",
    "Request",
    "RequestCancelled",
    "Result",
    "ServerBusy",
    "ServerStopped",
    "UnknownAdapter",
]
