"""Classifier-free guidance in one forward pass: C. Perez Jensen and S. Sadat 2025 (arXiv 2503.07274)."""

from mixadapters.tuners.agd.config import AGDConfig
from mixadapters.tuners.agd.model import AGDModel
from mixadapters.tuners.agd.pipeline import OnePass

__all__ = ["AGDConfig", "AGDModel", "OnePass"]
