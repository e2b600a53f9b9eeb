"""Serving adapters and mixtures: requests that name what they want, and requests that choose."""

from typing import TYPE_CHECKING, Any

from mixadapters.core.starting import waits

if TYPE_CHECKING:
    from mixadapters.serving.engine import AdapterServer

if not waits(__name__):  # a command reads its arguments first
    from mixadapters.serving.cascade import Calibration, CascadeOutput, ConfidenceCascade, confidence
    from mixadapters.serving.composition import CompositionRouter
    from mixadapters.serving.contrast import SelfContrastLogitsProcessor
    from mixadapters.serving.expert_cache import ExpertCache, expert_aware_batches, request_experts, token_experts
    from mixadapters.serving.global_local import FeatureGaussian, GlobalLocalMixture
    from mixadapters.serving.pooled_states import PooledStates
    from mixadapters.serving.pregating import (
        PregateAgreement,
        distill_layer_pregates,
        distill_pregate,
        pregate_agreement,
    )
    from mixadapters.serving.requests import (
        AdapterRefused,
        AdapterUnreadable,
        DeadlineExceeded,
        Request,
        RequestCancelled,
        Result,
        ServerBusy,
        ServerStopped,
        UnknownAdapter,
    )
    from mixadapters.serving.ring import ExpertRing
    from mixadapters.serving.selection import Budget, Selection, fit_mapping, mask_gate, select_experts

__all__ = [
    "AdapterRefused",
    "AdapterServer",
    "AdapterUnreadable",
    "Budget",
    "Calibration",
    "CascadeOutput",
    "CompositionRouter",
    "ConfidenceCascade",
    "DeadlineExceeded",
    "ExpertCache",
    "ExpertRing",
    "FeatureGaussian",
    "GlobalLocalMixture",
    "PooledStates",
    "PregateAgreement",
    "Request",
    "RequestCancelled",
    "Result",
    "Selection",
    "SelfContrastLogitsProcessor",
    "ServerBusy",
    "ServerStopped",
    "UnknownAdapter",
    "confidence",
    "distill_layer_pregates",
    "distill_pregate",
    "expert_aware_batches",
    "fit_mapping",
    "mask_gate",
    "pregate_agreement",
    "request_experts",
    "select_experts",
    "token_experts",
]


def __getattr__(name: str) -> Any:
    if name == "AdapterServer":  # which alone needs a transformers as new as `manager` says
        from mixadapters.serving.engine import AdapterServer

        return AdapterServer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
