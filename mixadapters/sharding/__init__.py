"""Experts spread over processes: who holds what, banks that hold a part, and what that sends."""

from mixadapters.sharding.placement import Placement, deal_tasks, even_placement, plan_placement

__all__ = ["Placement", "deal_tasks", "even_placement", "plan_placement"]
