"""Serving adapters and mixtures: requests that name what they want, and requests that choose."""

from mixadapters.serving.cascade import Calibration, CascadeOutput, ConfidenceCascade, confidence
from mixadapters.serving.composition import CompositionRouter
from mixadapters.serving.contrast import SelfContrastLogitsProcessor
from mixadapters.serving.expert_cache import ExpertCache, expert_aware_batches, request_experts, token_experts
from mixadapters.serving.global_local import FeatureGaussian, GlobalLocalMixture
from mixadapters.serving.pooled_states import PooledStates
from mixadapters.serving.ring import ExpertRing
from mixadapters.serving.selection import Budget, Selection, fit_mapping, mask_gate, select_experts

__all__ = [
    "Budget",
    "Calibration",
    "CascadeOutput",
    "CompositionRouter",
    "ConfidenceCascade",
    "ExpertCache",
    "ExpertRing",
    "FeatureGaussian",
    "GlobalLocalMixture",
    "PooledStates",
    "Selection",
    "SelfContrastLogitsProcessor",
    "confidence",
    "expert_aware_batches",
    "fit_mapping",
    "mask_gate",
    "request_experts",
    "select_experts",
    "token_experts",
]
