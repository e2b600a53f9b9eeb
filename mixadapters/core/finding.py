"""Finds the modules of a model that take a method's adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mixadapters.core.absent import module_names
from mixadapters.core.adapter import Site
from mixadapters.core.config import MixtureConfig
from mixadapters.core.files import being_loaded
from mixadapters.core.layer import AdapterHost
from mixadapters.core.media import generates_beside_media, media_part
from mixadapters.core.routing import NO_LAYER
from mixadapters.core.sites import (
    ARCHITECTURES,
    ROLES,
    find_architecture,
    group_of,
    hidden_size_of,
    is_causal,
    is_pointwise,
    layer_index,
    stack_of,
    sublayer_of,
    unwrapped,
)
from mixadapters.core.walking import outside_adapters, plain_path

TARGET = "target"  # role of modules that the user names by target_modules


class Unchanging(NamedTuple):
    """What an injection asks for at each site and leaves as it is. To find it takes longer the larger the model."""

    config: dict[str, Any]  # the model's, as PEFT gives it: a deep copy
    names: list[str]  # of the modules, as they are without adapters


class SiteFinder(BaseTuner):
    """Which modules of the model take adapters. A method writes `roles`; the others are there to be extended."""

    _unchanging: Unchanging | None = None  # during an injection

    def roles(self, config: Any) -> tuple[str, ...]:
        """Roles (see `core.sites`) of the modules that take an adapter, where the user names none."""
        raise NotImplementedError

    def taps(self, config: Any) -> tuple[str, ...]:
        """Roles of the modules in the same layer whose input the adapters read."""
        return ()

    def known_roles(self, config: MixtureConfig) -> set[str]:
        """The roles that have modules here: those of `sites`, or of the architecture."""
        if config.sites is not None:
            return set(config.sites)
        row = find_architecture(self.get_model_config(self.model).get("model_type", "custom"), self.model)
        return {role for role in ROLES if getattr(row, role) is not None}

    def resolve(self, config: Any, model_config: dict[str, Any]) -> None:
        """Fill in what the config leaves to the model: sites, widths ... Raises ValueError where that cannot be."""
        if config.sites is None and config.target_modules is None:
            row = find_architecture(model_config.get("model_type", "custom"), self.model)
            needed = (*self.roles(config), *self.taps(config))
            for role in needed:
                if getattr(row, role) is None:
                    raise ValueError(
                        f"{model_config['model_type']!r} models have no module for the role {role!r} that "
                        f"{type(config).__name__} needs with these fields; choose another placement or input, or pass "
                        f"sites={{{role!r}: <regular expression>}}"
                    )
            config.sites = {role: getattr(row, role) for role in needed}
        if config.sites is not None:
            missing = [r for r in (*self.roles(config), *self.taps(config)) if r not in config.sites]
            if missing:
                raise ValueError(f"sites={config.sites} lacks the roles {missing} that this config needs")
            union = self.union_of(config)
            if config.target_modules not in (None, union):
                raise ValueError("give either `sites` or `target_modules`, not both")
            config.target_modules = union

    def union_of(self, config: MixtureConfig) -> str:
        """One pattern of all modules that take adapters by the roles in `sites`."""
        assert config.sites is not None
        return "|".join(f"(?:{config.sites[role]})" for role in self.roles(config))

    def hosts(self) -> Iterator[AdapterHost]:
        """The layers of this model that hold adapters."""
        return (module for _, module in outside_adapters(self.model) if isinstance(module, AdapterHost))

    def placed(self, adapter_name: str) -> dict[AdapterHost, Any]:
        """The layers that hold an adapter -> what it is there."""
        return {host: host.adapters[adapter_name] for host in self.hosts() if adapter_name in host.adapters}

    def host_at(self, path: str, missing_ok: bool = False) -> Any:
        """The host at the module `path`. Raises ValueError where there is none, unless `missing_ok`: then None."""
        host = next((h for h in self.hosts() if h.path == path and h.prefix == self.prefix), None)
        if host is None and not missing_ok:
            raise ValueError(f"no adapter sits at {path!r}")
        return host

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        layers = peft_config.layers_to_transform
        matched = found is True or isinstance(found, re.Match)
        if matched and peft_config.sites is not None and layers is not None:
            return layer_index(key) in ([layers] if isinstance(layers, int) else layers)
        return found

    def places(self) -> list[str]:
        """All modules that are there without adapters, by name."""
        return [name for name in self._module_names() if name]

    def name_all_linear(self, config: Any) -> Any:
        """Give "all-linear" the names of the linear modules; PEFT passes over those that our layers have wrapped."""
        shorthand = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
        config = _maybe_include_all_linear_layers(config, self.model)
        if shorthand:
            head = unwrapped(getattr(self.model, "get_output_embeddings", lambda: None)())
            bases = {host.path: unwrapped(host.get_base_layer()) for host in self.hosts()}
            linear = {
                path for path, base in bases.items() if isinstance(base, (nn.Linear, Conv1D)) and base is not head
            }
            config.target_modules = {*config.target_modules, *linear}
            config.target_modules = {path for path in config.target_modules if not self._cannot_follow(path)}
        return config

    def ranked(self, config: Any) -> list[str]:
        """Paths of the modules whose adapters `rank_pattern` gives a rank to."""
        return self.matched(config)

    def matched(self, config: MixtureConfig) -> list[str]:
        """Paths of the modules that take an adapter by this config; those inside other adapters' layers do not."""
        outside = dict(outside_adapters(self.model))
        layers = [f"{name}." for name, module in outside.items() if isinstance(module, BaseTunerLayer)]
        return [
            name
            for name in outside
            if name and not name.startswith(tuple(layers)) and self._check_target_module_exists(config, name)
        ]

    def _refuse_nested(self, config: MixtureConfig) -> None:
        """Sites inside sites would be lost on unload and skipped by later adapters."""
        existing = {host.path for host in self.hosts()}
        wanted = {name for name in self.places() if self._check_target_module_exists(config, name)}
        places = sorted(existing | wanted)
        for outer, inner in pairwise(places):
            if inner.startswith(f"{outer}.") and (inner in wanted or outer in wanted):
                raise ValueError(
                    f"{inner!r} lies inside {outer!r}, and both would hold adapters; target one of them, or use "
                    "exclude_modules"
                )

    def _cannot_follow(self, path: str) -> str | None:
        """Why no adapter can follow the module at `path`; None if one can."""
        base, parent = self._unwrapped(path), self._unwrapped(path.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            return (
                "lies in nn.MultiheadAttention, which reads the weights and calls none of its layers, so that an "
                "adapter there would do nothing: target the attention as a whole, or leave it out (exclude_modules)"
            )
        if is_base_router(base):
            return (
                f"({type(base).__name__}) chooses experts of the base model and gives several tensors that belong "
                "together, of which an adapter would change one: leave it out (exclude_modules)"
            )
        return None

    def _refuse_unfollowed(self, config: MixtureConfig) -> None:
        """Refuse modules that adapters cannot follow. In a saved adapter nothing comes of those, so it is read."""
        fused = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
        walk = ((name, module) for name, module in outside_adapters(self.model) if name and isinstance(module, fused))
        owners = {f"{plain_path(name)}.": module for name, module in walk}
        for path in self.matched(config):
            if being_loaded() is None and (reason := self._cannot_follow(path)):
                raise ValueError(f"{path!r} {reason}")
            outer = next((owner for name, owner in owners.items() if path.startswith(name)), None)
            if outer is not None and torch.backends.mha.get_fastpath_enabled():
                raise ValueError(
                    f"{path!r} lies in {type(outer).__name__}, whose fast path reads the weights in evaluation and "
                    "calls none of its layers, so that an adapter there would do nothing: call "
                    "torch.backends.mha.set_fastpath_enabled(False) in this process before"
                )

    def _unwrapped(self, path: str) -> nn.Module:
        module = self.model
        for part in filter(None, path.split(".")):
            module = unwrapped(getattr(module, part))
        return module

    def _site(self, config: MixtureConfig, adapter_name: str, base: nn.Module, path: str) -> Site:
        role = TARGET
        if config.sites is not None:
            role = next(r for r in self.roles(config) if re.fullmatch(config.sites[r], path))
        width_in, width_out = self._widths(config, base, path)
        stack = media_part(path, self.model) or stack_of(path, self.model)
        taps = tuple((r, self._nearest_tap(config.sites[r], path)) for r in self.taps(config)) if config.sites else ()
        layer = layer_index(path)
        return Site(
            role, path, width_in, width_out, stack, self._is_causal(path), taps,
            adapter=adapter_name, group=self._group(role, path), layer=NO_LAYER if layer is None else layer,
        )  # fmt: skip

    def _group(self, role: str, path: str) -> str:
        if role in ROLES:
            return group_of(role)
        return sublayer_of(path, ARCHITECTURES.get(self._model_config().get("model_type", "custom")))

    def _widths(self, config: MixtureConfig, base: nn.Module, path: str) -> tuple[int, int]:
        if isinstance(base, Conv1D):
            return base.nx, base.nf
        if hasattr(base, "in_features") and hasattr(base, "out_features"):
            return base.in_features, base.out_features
        if is_pointwise(base):
            return base.in_channels, base.out_channels
        if isinstance(base, (nn.Embedding, nn.modules.conv._ConvNd)):
            raise ValueError(
                f"Target module {path} is not supported: {type(base).__name__}; target linear layers, convolutions of "
                "kernel 1 without padding and groups, or blocks"
            )
        weight = getattr(base, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:  # a norm
            width = getattr(weight, "ds_shape", weight.shape)[0]  # where ZeRO-3 has shared it out
            return width, width
        width = config.hidden_size or hidden_size_of(getattr(self.model, "config", None))
        if width is None:
            raise ValueError(f"cannot tell the width of {path!r} ({type(base).__name__}); pass hidden_size")
        return width, width

    def _is_causal(self, path: str) -> bool:
        """Whether positions at this module must not see later ones."""
        if generates_beside_media(self.model):
            return not media_part(path, self.model)
        return is_causal(path, self.model, self._model_config())

    def _model_config(self) -> dict[str, Any]:
        """The model's config as PEFT gives it."""
        return self.get_model_config(self.model) if self._unchanging is None else self._unchanging.config

    def _module_names(self) -> list[str]:
        return module_names(self.model) if self._unchanging is None else self._unchanging.names

    def _nearest_tap(self, pattern: str, path: str) -> str:
        """The module that matches `pattern` and shares the longest path with `path`."""
        matching = [name for name in self._module_names() if re.fullmatch(pattern, name)]
        if not matching:
            raise ValueError(
                f"no module matches {pattern!r}, whose input the adapter at {path!r} reads; choose another input "
                "(adapter_input), or pass sites"
            )

        def shared(name: str) -> int:
            pairs = zip(name.split("."), path.split("."), strict=False)
            return next((i for i, (a, b) in enumerate(pairs) if a != b), 0)

        return max(matching, key=shared)

    def rank_at(self, config: Any, path: str, default: int) -> int:
        """The rank for a site: `rank_pattern` first."""
        rank: int = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), path), default)
        saved = being_loaded()
        if saved is not None and saved.shapes and not any(self.prefix in key for key in saved.shapes):
            raise ValueError(
                f"{saved.model_id}: the file holds 0 weights of this adapter; it has {min(saved.shapes)!r}"
            )
        if saved is not None and saved.shapes and rank > saved.widest:
            raise ValueError(
                f"the config asks for rank {rank} at {path!r}, and the file's widest weight has {saved.widest}"
            )
        return rank


def is_base_router(module: nn.Module) -> bool:
    """Whether a linear layer chooses experts of the base model, and gives scores and more (Llama 4, PhiMoE)."""
    return isinstance(module, nn.Linear) and type(module).__name__.endswith("Router")
