"""The verbs of surgery, for the adapters of one tuner: thin methods over `mixadapters.surgery`."""

from __future__ import annotations

from typing import Any

from mixadapters.core.model import MixtureModel
from mixadapters.core.names import UNNAMED, of_active
from mixadapters.surgery.merging import MergeResult, merge_experts
from mixadapters.surgery.pruning import PruneResult, prune_experts
from mixadapters.surgery.usage import ExpertUsage


class SurgeryVerbs(MixtureModel):
    """Part of the tuners whose experts can come and go."""

    @of_active
    def prune_experts(
        self, usage: ExpertUsage | None, keep: int | None = None, *, adapter_name: str = UNNAMED, **options: Any
    ) -> PruneResult:
        """Cut out the experts that matter least. See `mixadapters.surgery.prune_experts`.

        usage: of `mixadapters.surgery.record_usage`; `self.record_usage` says what routers do, not what experts give.

        Raises:
            ValueError: as there.
        """
        return prune_experts(self, usage, keep, adapter=adapter_name, **options)

    @of_active
    def merge_experts(
        self, usage: ExpertUsage, groups: Any, *, adapter_name: str = UNNAMED, **options: Any
    ) -> MergeResult:
        """Make one expert of several. See `mixadapters.surgery.merge_experts`.

        Raises:
            ValueError: as there.
        """
        return merge_experts(self, usage, groups, adapter=adapter_name, **options)
