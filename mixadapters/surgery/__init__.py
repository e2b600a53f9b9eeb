"""Seeing and cutting experts: those of our mixtures and those of MoE base models."""

from mixadapters.surgery.layers import ExpertLayer, Routed, expert_layers
from mixadapters.surgery.merging import MergeResult, merge_experts
from mixadapters.surgery.pruning import PruneCurve, PruneResult, prune_curve, prune_experts
from mixadapters.surgery.usage import ExpertUsage, LayerUsage, record_usage

__all__ = [
    "ExpertLayer",
    "ExpertUsage",
    "LayerUsage",
    "MergeResult",
    "PruneCurve",
    "PruneResult",
    "Routed",
    "expert_layers",
    "merge_experts",
    "prune_curve",
    "prune_experts",
    "record_usage",
]
