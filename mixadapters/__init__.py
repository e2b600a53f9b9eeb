"""Mixtures of small experts in frozen pretrained models, as types of Hugging Face PEFT.

Importing this package registers them: afterwards `peft.get_peft_model(model, MixDAConfig(...))` and all of PEFT's
verbs work as for PEFT's own types.
"""

from mixadapters.core import checkout as _checkout  # noqa: F401  # says where kernels and tasks lie

# isort: split

from mixadapters.core.starting import waits

if not waits(__name__):  # a command reads its arguments first
    from mixadapters.core.context import ForwardContext
    from mixadapters.core.model import MixtureModel
    from mixadapters.routers import ROUTERS, Router
    from mixadapters.tuners import (
        AGDConfig,
        BottleneckConfig,
        LazyAdamW,
        MixDAConfig,
        MoAConfig,
        MoSAConfig,
        PILLConfig,
    )
    from mixadapters.tuners.registration import register

__version__ = "0.1.0.dev0"

_LAZY = {
    "StageCallback": "mixadapters.training.callbacks",
    "GateUsageCallback": "mixadapters.training.callbacks",
    "RouterScheduleCallback": "mixadapters.training.routing",
    "BalanceBiasCallback": "mixadapters.training.routing",
    "PermutationSearchCallback": "mixadapters.training.routing",
    "ExpertPruneCallback": "mixadapters.training.pruning",
    "ExpertSpawnCallback": "mixadapters.training.spawning",
    "StagedDistillCallback": "mixadapters.training.staged_distillation",
    "MixtureDistiller": "mixadapters.training.mixture_distillation",
    "MixtureTeacher": "mixadapters.training.mixture_distillation",
    "distil_mixture": "mixadapters.training.mixture_distillation",
}

__all__ = [
    "ROUTERS",
    "AGDConfig",
    "BalanceBiasCallback",
    "BottleneckConfig",
    "ExpertPruneCallback",
    "ExpertSpawnCallback",
    "ForwardContext",
    "GateUsageCallback",
    "LazyAdamW",
    "MixDAConfig",
    "MixtureDistiller",
    "MixtureModel",
    "MixtureTeacher",
    "MoAConfig",
    "MoSAConfig",
    "PILLConfig",
    "PermutationSearchCallback",
    "Router",
    "RouterScheduleCallback",
    "StageCallback",
    "StagedDistillCallback",
    "distil_mixture",
    "register",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    # The callbacks need transformers' Trainer, which is slow to import.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
