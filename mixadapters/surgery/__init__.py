"""Seeing and cutting experts: those of our mixtures and those of MoE base models."""

from mixadapters.core.starting import waits

if not waits(__name__):  # a command reads its arguments first
    from mixadapters.surgery.compressed import compress_folder, expand_compressed, load_compressed, save_compressed
    from mixadapters.surgery.compressing import Compression, compress_experts
    from mixadapters.surgery.extraction import Extraction, extract_experts, using_experts
    from mixadapters.surgery.layers import ExpertLayer, Routed, expert_layers
    from mixadapters.surgery.merging import MergeResult, merge_experts
    from mixadapters.surgery.overspecification import Overspecification, overspecification_report
    from mixadapters.surgery.page import write_page
    from mixadapters.surgery.pruning import PruneCurve, PruneResult, prune_curve, prune_experts
    from mixadapters.surgery.reporting import Report, report
    from mixadapters.surgery.saving import load_pruned, save_pruned
    from mixadapters.surgery.splitting import join_experts, split_expert
    from mixadapters.surgery.tracing import LayerRoutes, RouteTable, routes
    from mixadapters.surgery.tuning import Ranked, ftri, rank_by_usage, selectivity, tune_experts
    from mixadapters.surgery.usage import ExpertUsage, LayerUsage, record_usage

__all__ = [
    "Compression",
    "ExpertLayer",
    "ExpertUsage",
    "Extraction",
    "LayerRoutes",
    "LayerUsage",
    "MergeResult",
    "Overspecification",
    "PruneCurve",
    "PruneResult",
    "Ranked",
    "Report",
    "RouteTable",
    "Routed",
    "compress_experts",
    "compress_folder",
    "expand_compressed",
    "expert_layers",
    "extract_experts",
    "ftri",
    "join_experts",
    "load_compressed",
    "load_pruned",
    "merge_experts",
    "overspecification_report",
    "prune_curve",
    "prune_experts",
    "rank_by_usage",
    "record_usage",
    "report",
    "routes",
    "save_compressed",
    "save_pruned",
    "selectivity",
    "split_expert",
    "tune_experts",
    "using_experts",
    "write_page",
]
