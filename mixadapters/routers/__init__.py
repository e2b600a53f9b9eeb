"""Routers by name. A new one is one file with a class under `@ROUTERS.register("name")`, imported here."""

from mixadapters.routers.arrow import ArrowRouter
from mixadapters.routers.base import ROUTERS, Router, build_router
from mixadapters.routers.cosine import CosineRouter
from mixadapters.routers.counts import CountsRouter
from mixadapters.routers.dense_to_sparse import DenseToSparseRouter
from mixadapters.routers.expert_choice import ExpertChoiceRouter
from mixadapters.routers.fixed import ConstantRouter, SingleRouter
from mixadapters.routers.hash import HashRouter
from mixadapters.routers.identifiability import Identifiability, gate_identifiability
from mixadapters.routers.learned import DomainGate, LearnedRouter
from mixadapters.routers.modality import Modalities, ModalityRouter
from mixadapters.routers.null import NullRouter
from mixadapters.routers.phatgoose import PhatgooseRouter
from mixadapters.routers.pregate import PregateRouter
from mixadapters.routers.recurrent import RecurrentRouter
from mixadapters.routers.sigmoid import SigmoidGate
from mixadapters.routers.softmax import SoftmaxGate
from mixadapters.routers.sparse import SparseRouter
from mixadapters.routers.task import TaskRouter
from mixadapters.routers.top_k import TopKRouter
from mixadapters.routers.top_p import TopPRouter
from mixadapters.routers.tree import TreeRouter

__all__ = [
    "ROUTERS",
    "ArrowRouter",
    "ConstantRouter",
    "CosineRouter",
    "CountsRouter",
    "DenseToSparseRouter",
    "DomainGate",
    "ExpertChoiceRouter",
    "HashRouter",
    "Identifiability",
    "LearnedRouter",
    "Modalities",
    "ModalityRouter",
    "NullRouter",
    "PhatgooseRouter",
    "PregateRouter",
    "RecurrentRouter",
    "Router",
    "SigmoidGate",
    "SingleRouter",
    "SoftmaxGate",
    "SparseRouter",
    "TaskRouter",
    "TopKRouter",
    "TopPRouter",
    "TreeRouter",
    "build_router",
    "gate_identifiability",
]
