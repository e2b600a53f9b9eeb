"""The former place of these names, which belong to `mixadapters.tuners.agd`."""

from mixadapters.tuners.agd import (
    GuidanceDistillation,
    LanguageGuidanceDistillation,
    guided_log_probabilities,
    relative_error,
    snr_weights,
)

__all__ = [
    "GuidanceDistillation",
    "LanguageGuidanceDistillation",
    "guided_log_probabilities",
    "relative_error",
    "snr_weights",
]
