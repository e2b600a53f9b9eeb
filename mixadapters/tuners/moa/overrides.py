"""Experts that are off, on or scaled, as MoA's config keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mixadapters.surgery.tuning import check_written
from mixadapters.tuners.moa.schedules import ScheduledConfig


@dataclass
class OverriddenConfig(ScheduledConfig):
    """Part of MoA's config."""

    expert_overrides: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Experts that are off, on or scaled, as `override_experts` leaves it.", "free": True},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_written(self.expert_overrides)
