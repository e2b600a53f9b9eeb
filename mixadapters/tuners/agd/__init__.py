"""Classifier-free guidance in one forward pass: C. Perez Jensen and S. Sadat 2025 (arXiv 2503.07274).

Everything that a user of the method needs is imported from here.
"""

from mixadapters.tuners.agd.config import AGDConfig
from mixadapters.tuners.agd.distillation import (
    GuidanceDistillation,
    LanguageGuidanceDistillation,
    guided_log_probabilities,
    relative_error,
    snr_weights,
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
]
