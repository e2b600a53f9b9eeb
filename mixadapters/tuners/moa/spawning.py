"""One expert becomes several: copies of which each loses other weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixadapters.core.bank import Expert
from mixadapters.core.fields import check_number
from mixadapters.core.names import UNNAMED, check_known, of_active
from mixadapters.tuners.moa.config import check_experts
from mixadapters.tuners.moa.verbs import ExpertVerbs
from mixadapters.tuners.sources import check_new


class ExpertSpawning(ExpertVerbs):
    """Part of MoA's tuner."""

    @of_active
    @torch.no_grad()
    def spawn_experts(
        self,
        from_expert: str,
        names: Sequence[str],
        *,
        mask_fraction: float = 0.5,
        noise: float = 0.0,
        adapter_name: str = UNNAMED,
    ) -> None:
        """Add copies of an expert; of each, and of the expert itself, other weights are set to 0 at random.

        So experts that begin as one become different (Nie et al. 2021, EvoMoE, arXiv 2112.14397). Without mask and
        noise nothing changes where the router's weights sum to 1. Each new arm of the router starts with an equal
        share. Make optimizers anew afterwards; `ExpertSpawnCallback` does so inside a Trainer.

        Args:
            names: of the new experts.
            mask_fraction: probability that an entry of a weight matrix becomes 0.
            noise: standard deviation of what is added to each matrix, as a factor on that of its entries.

        Raises:
            ValueError: no such expert, a name that is taken, a number out of range, or a router that cannot gain arms.
        """
        config = self._moa(adapter_name)
        check_known("expert", from_expert, config.all_names())
        if isinstance(names, str) or not names or len(set(names)) < len(names):
            raise ValueError(f"names={names!r} must be a list of different names for the new experts")
        check_number("mask_fraction", mask_fraction, least=0, below=1)
        check_number("noise", noise, least=0)
        for name in check_experts(list(names), from_file=False):
            check_new("expert", name, config.all_names(), self.peft_config.keys() - {adapter_name})
        self._require(adapter_name, "add_expert")
        for name in names:
            self._add_copy(name, from_expert, 1 / (len(config.all_names()) + 1), adapter_name)
        for _, mixture in self._mixtures(adapter_name):
            for i, piece in enumerate(config.pieces(from_expert)):
                if piece in mixture.bank.experts:
                    for name in (from_expert, *names):
                        diversify(mixture.bank.experts[config.pieces(name)[i]], mask_fraction, noise)
        self.fit_router(adapter_name, missing_ok=True)
        self._settle(adapter_name)


def diversify(expert: Expert, mask_fraction: float, noise: float) -> None:
    """Change the weight matrices of an expert at random, in place."""
    for part in (expert.down, expert.gate, expert.up):
        if part is None:
            continue
        weight = part.weight
        if noise:
            weight.add_(torch.randn_like(weight), alpha=noise * float(weight.std(correction=0)))
        if mask_fraction:
            weight.masked_fill_(torch.rand_like(weight, dtype=torch.float32) < mask_fraction, 0.0)
