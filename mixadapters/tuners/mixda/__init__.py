"""MixDA, mixture of domain adapters: Diao et al. 2023 (arXiv 2306.05406)."""

from mixadapters.tuners.mixda.config import MixDAConfig
from mixadapters.tuners.mixda.model import MixDAModel

__all__ = ["MixDAConfig", "MixDAModel"]
