"""Routers by name. A new one is one file with a class under `@ROUTERS.register("name")`, imported here."""

from mixadapters.routers.base import ROUTERS, Router, build_router
from mixadapters.routers.counts import CountsRouter
from mixadapters.routers.fixed import ConstantRouter, SingleRouter
from mixadapters.routers.learned import DomainGate, LearnedRouter
from mixadapters.routers.modality import Modalities, ModalityRouter
from mixadapters.routers.sigmoid import SigmoidGate
from mixadapters.routers.softmax import SoftmaxGate

__all__ = [
    "ROUTERS",
    "ConstantRouter",
    "CountsRouter",
    "DomainGate",
    "LearnedRouter",
    "Modalities",
    "ModalityRouter",
    "Router",
    "SigmoidGate",
    "SingleRouter",
    "SoftmaxGate",
    "build_router",
]
