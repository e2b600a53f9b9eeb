"""The methods. Importing this package registers them with PEFT."""

from mixadapters.tuners.agd import AGDConfig, AGDModel
from mixadapters.tuners.bottleneck import BottleneckConfig, BottleneckModel
from mixadapters.tuners.mixda import MixDAConfig, MixDAModel
from mixadapters.tuners.moa import MoAConfig, MoAModel
from mixadapters.tuners.mosa import LazyAdamW, MoSAConfig, MoSAModel
from mixadapters.tuners.pill import PILLConfig, PILLModel
from mixadapters.tuners.registration import register
from mixadapters.tuners.verbs import watch_verbs

watch_verbs()
register("agd", AGDConfig, AGDModel)
register("bottleneck", BottleneckConfig, BottleneckModel)
register("mixda", MixDAConfig, MixDAModel)
register("moa", MoAConfig, MoAModel)
register("mosa", MoSAConfig, MoSAModel)
register("pill", PILLConfig, PILLModel)

__all__ = [
    "AGDConfig",
    "AGDModel",
    "BottleneckConfig",
    "BottleneckModel",
    "LazyAdamW",
    "MixDAConfig",
    "MixDAModel",
    "MoAConfig",
    "MoAModel",
    "MoSAConfig",
    "MoSAModel",
    "PILLConfig",
    "PILLModel",
]
