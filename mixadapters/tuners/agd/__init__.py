"""Classifier-free guidance in one forward pass: C. Perez Jensen and S. Sadat 2025 (arXiv 2503.07274).

Everything that a user of the method needs is imported from here.
"""

from typing import Any

from mixadapters.tuners.agd.config import AGDConfig
from mixadapters.tuners.agd.distillation import (
    GuidanceDistillation,
    LanguageGuidanceDistillation,
    guided_log_probabilities,
    relative_error,
    snr_weights,
    space_weights,
)
from mixadapters.tuners.agd.guidance import classifier_free, denoiser, guided, nested, prediction_of, sample, scale_at
from mixadapters.tuners.agd.model import AGDModel
from mixadapters.tuners.agd.pipeline import OnePass
from mixadapters.tuners.agd.pipelines import encode_prompts, record_pipeline
from mixadapters.tuners.agd.recording import TrajectoryPlan, record
from mixadapters.tuners.agd.trajectories import Trajectories, TrajectoryCollator

__all__ = [
    "AGDConfig",
    "AGDModel",
    "AdapterGuidance",
    "GuidanceDistillation",
    "LanguageGuidanceDistillation",
    "OnePass",
    "Trajectories",
    "TrajectoryCollator",
    "TrajectoryPlan",
    "classifier_free",
    "denoiser",
    "encode_prompts",
    "guided",
    "guided_log_probabilities",
    "nested",
    "prediction_of",
    "record",
    "record_pipeline",
    "relative_error",
    "sample",
    "scale_at",
    "snr_weights",
    "space_weights",
]


def __getattr__(name: str) -> Any:
    if name == "AdapterGuidance":  # a class of diffusers, which only pipelines need
        from mixadapters.tuners.agd.guider import AdapterGuidance

        return AdapterGuidance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
