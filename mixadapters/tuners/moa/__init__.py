"""MoA, mixtures of adapters: trained or new experts of any kind under any router."""

from mixadapters.tuners.moa.config import MoAConfig
from mixadapters.tuners.moa.model import MoAModel

__all__ = ["MoAConfig", "MoAModel"]
