"""PILL, modality experts and an attention gate: Zhang et al. 2023 (arXiv 2311.02126)."""

from mixadapters.tuners.pill.audio import AudioInputs
from mixadapters.tuners.pill.collator import AudioTextCollator, ImageTextCollator
from mixadapters.tuners.pill.config import PILLConfig
from mixadapters.tuners.pill.images import ImageInputs
from mixadapters.tuners.pill.model import PILLModel

__all__ = ["AudioInputs", "AudioTextCollator", "ImageInputs", "ImageTextCollator", "PILLConfig", "PILLModel"]
