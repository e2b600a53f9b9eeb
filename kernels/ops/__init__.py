"""One operation for every bank of small experts: `lowrank`, and the choice of how to run it.

The module knows tensors only. `reference` is the definition; the other backends compute the same numbers faster.
"""

from mixadapters.kernels.activations import ACTIVATIONS, activated
from mixadapters.kernels.backends import BACKENDS, adapter_backend, choose_backend, overridden
from mixadapters.kernels.few import Few
from mixadapters.kernels.lowrank import lowrank
from mixadapters.kernels.problem import constant

__all__ = [
    "ACTIVATIONS", "BACKENDS", "Few", "activated", "adapter_backend", "choose_backend", "constant", "lowrank",
    "overridden",
]  # fmt: skip
