from __future__ import annotations

from mixadapters.core.adapter import Site
from mixadapters.core.bank import AdapterBank
from mixadapters.core.mixture import Mixture
from mixadapters.core.model import MixtureModel
from mixadapters.routers import SingleRouter
from mixadapters.tuners.bottleneck.config import BottleneckConfig, bottleneck_width, placement_roles, placement_taps

EXPERT = "adapter"  # name of the only expert of a bank


class BottleneckModel(MixtureModel):
    """The tuner of bottleneck adapters: one at each site."""

    def roles(self, config: BottleneckConfig) -> tuple[str, ...]:
        return placement_roles(config.placement, config.adapter_input, self.known_roles(config))

    def taps(self, config: BottleneckConfig) -> tuple[str, ...]:
        return placement_taps(config.placement, config.adapter_input, self.known_roles(config))

    def build(self, config: BottleneckConfig, site: Site) -> Mixture:
        rank = self.rank_at(config, site.path, config.r or 0)
        return bottleneck(config, site, rank, tap=site.tap("ffn_norm") or site.tap("ffn_input"))


def bottleneck(config: BottleneckConfig, site: Site, rank: int, tap: str | None = None) -> Mixture:
    """The adapter that `config` describes at `site`. rank 0: by the config's reduction factor."""
    parallel = config.placement == "parallel"
    width = site.out_features if tap is not None or not parallel else site.in_features
    bank = AdapterBank(width, site.out_features, **config.bank_options())
    bank.add(EXPERT, rank or bottleneck_width(width, config.reduction_factor), config.init_weights)
    return Mixture(
        SingleRouter(width, [EXPERT]), bank, "parallel" if parallel else "sequential", tap=tap,
        dropout=config.dropout, observes=True,
    )  # fmt: skip
