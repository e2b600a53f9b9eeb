"""MoSA, mixture of sparse adapters: Zhang et al. 2023 (arXiv 2312.02923)."""

from mixadapters.tuners.mosa.config import MoSAConfig
from mixadapters.tuners.mosa.lazy import LazyAdamW
from mixadapters.tuners.mosa.model import MoSAModel

__all__ = ["LazyAdamW", "MoSAConfig", "MoSAModel"]
