"""Routers by name. A new one is one file with a class under `@ROUTERS.register("name")`, imported here."""

from mixadapters.routers.base import ROUTERS, Router, build_router
from mixadapters.routers.fixed import ConstantRouter, SingleRouter
from mixadapters.routers.learned import DomainGate, SigmoidGate, SoftmaxGate
from mixadapters.routers.modality import Modalities, ModalityRouter

__all__ = [
    "ROUTERS",
    "ConstantRouter",
    "DomainGate",
    "Modalities",
    "ModalityRouter",
    "Router",
    "SigmoidGate",
    "SingleRouter",
    "SoftmaxGate",
    "build_router",
]
