"""Experts spread over processes: who holds what, banks that hold a part, and what that sends."""

from mixadapters.sharding.bank import ShardedBank
from mixadapters.sharding.experts import ExpertSharding, shard_experts
from mixadapters.sharding.placement import Placement, deal_tasks, even_placement, plan_placement
from mixadapters.sharding.traffic import (
    Traffic,
    ddp_bytes_per_step,
    experts_bytes_per_step,
    fsdp2_bytes_per_step,
    padded_bytes,
)
from mixadapters.sharding.trainer import ExpertShardingCallback, SameBatchesMixin

__all__ = [
    "ExpertSharding",
    "ExpertShardingCallback",
    "Placement",
    "SameBatchesMixin",
    "ShardedBank",
    "Traffic",
    "ddp_bytes_per_step",
    "deal_tasks",
    "even_placement",
    "experts_bytes_per_step",
    "fsdp2_bytes_per_step",
    "padded_bytes",
    "plan_placement",
    "shard_experts",
]
