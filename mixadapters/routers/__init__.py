"""Routers by name. A new one is one file with a class under `@ROUTERS.register("name")`, imported here."""

from mixadapters.routers.base import ROUTERS, Router, build_router
from mixadapters.routers.counts import CountsRouter
from mixadapters.routers.fixed import ConstantRouter, SingleRouter
from mixadapters.routers.learned import DomainGate, LearnedRouter
from mixadapters.routers.modality import Modalities, ModalityRouter
from mixadapters.routers.null import NullRouter
from mixadapters.routers.sigmoid import SigmoidGate
from mixadapters.routers.softmax import SoftmaxGate
from mixadapters.routers.sparse import SparseRouter
from mixadapters.routers.top_k import TopKRouter
from mixadapters.routers.top_p import TopPRouter

__all__ = [
    "ROUTERS",
    "ConstantRouter",
    "CountsRouter",
    "DomainGate",
    "LearnedRouter",
    "Modalities",
    "ModalityRouter",
    "NullRouter",
    "Router",
    "SigmoidGate",
    "SingleRouter",
    "SoftmaxGate",
    "SparseRouter",
    "TopKRouter",
    "TopPRouter",
    "build_router",
]
