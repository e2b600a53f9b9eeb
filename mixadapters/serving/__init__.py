"""Serving adapters and mixtures: requests that name what they want, and requests that choose."""

from mixadapters.serving.expert_cache import ExpertCache, expert_aware_batches, request_experts, token_experts
from mixadapters.serving.selection import Budget, Selection, fit_mapping, mask_gate, select_experts

__all__ = [
    "Budget",
    "ExpertCache",
    "Selection",
    "expert_aware_batches",
    "fit_mapping",
    "mask_gate",
    "request_experts",
    "select_experts",
    "token_experts",
]
