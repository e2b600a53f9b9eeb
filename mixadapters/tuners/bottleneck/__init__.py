"""Bottleneck adapters: Houlsby et al. 2019 (arXiv 1902.00751), Pfeiffer et al. 2021 (2005.00247), He et al. 2022
(2110.04366, parallel)."""

from mixadapters.tuners.bottleneck.config import BottleneckConfig
from mixadapters.tuners.bottleneck.model import BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckModel"]
