"""The former place of these names, which belong to `mixadapters.tuners.agd`."""

from mixadapters.tuners.agd import (
    Trajectories,
    TrajectoryCollator,
    TrajectoryPlan,
    classifier_free,
    denoiser,
    guided,
    nested,
    prediction_of,
    record,
    sample,
    scale_at,
)

__all__ = [
    "Trajectories",
    "TrajectoryCollator",
    "TrajectoryPlan",
    "classifier_free",
    "denoiser",
    "guided",
    "nested",
    "prediction_of",
    "record",
    "sample",
    "scale_at",
]
