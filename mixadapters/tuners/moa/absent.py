"""What MoA's config says of experts, layers and modules that the model does not have: refused before it changes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mixadapters.core.fields import default_of
from mixadapters.core.files import being_loaded
from mixadapters.core.sites import layer_index
from mixadapters.tuners.moa.config import MoAConfig, layer_range
from mixadapters.tuners.moa.router import router_spec
from mixadapters.tuners.sources import same_module


def refuse_absent(config: MoAConfig, adapted: Sequence[str], modules: Sequence[str]) -> None:
    """Raise ValueError for the first field that means nothing here.

    Args:
        adapted: modules that take experts.
        modules: all of the model.
    """
    cls, options = router_spec(config)
    count = len([piece for name in config.all_names() for piece in config.pieces(name)])
    arms, chosen = count + options.get("null_arms", cls.usual_null_arms), options.get("k")
    assert isinstance(config.router, dict)
    given = "k" in config.router or config.num_experts_per_tok != default_of(config, "num_experts_per_tok")
    made_here = being_loaded() is None  # experts of a saved mixture may have been removed
    if chosen is not None and chosen > arms and given and made_here:
        raise ValueError(f"num_experts_per_tok={chosen}: there are {arms} experts to choose from")
    _refuse_layers(config, adapted, modules)
    for pattern in config.alpha_pattern:
        if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in adapted):  # as PEFT reads it
            raise ValueError(
                f"alpha_pattern={config.alpha_pattern}: {pattern!r} matches no module that takes experts; those are "
                f"{list(adapted)[:4]} ..."
            )
    for name, spec in (config.experts or {}).items():
        if absent := [m for m in spec.get("same_as", ()) if not any(same_module(m, path) for path in adapted)]:
            raise ValueError(f"experts[{name!r}]: same_as names {absent}, which take no experts")
    for module in config.null_arms:
        if not any(same_module(module, path) for path in adapted):
            raise ValueError(f"null_arms={config.null_arms} name {module!r}, which takes no experts")


def _refuse_layers(config: MoAConfig, adapted: Sequence[str], modules: Sequence[str]) -> None:
    if not isinstance(config.num_experts, dict) or config.experts is not None:
        return
    there = {index for path in modules if (index := layer_index(path)) is not None}
    takes = {index for path in adapted if (index := layer_index(path)) is not None}
    for layers in config.num_experts:
        named = layer_range(layers)
        if named[-1] > max(there, default=-1) or not takes.intersection(named):
            raise ValueError(
                f"num_experts={config.num_experts}: {layers!r} names layers that take no experts; those that do are "
                f"{sorted(takes)}"
            )
