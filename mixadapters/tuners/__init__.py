"""The methods. Importing this package registers them with PEFT."""

from mixadapters.tuners.bottleneck import BottleneckConfig, BottleneckModel
from mixadapters.tuners.mixda import MixDAConfig, MixDAModel
from mixadapters.tuners.registration import register

register("bottleneck", BottleneckConfig, BottleneckModel)
register("mixda", MixDAConfig, MixDAModel)

__all__ = ["BottleneckConfig", "BottleneckModel", "MixDAConfig", "MixDAModel"]
