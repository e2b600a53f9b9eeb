"""Finds the sites of a method in a model and puts its adapters there. A method writes `roles` and `build`."""

from __future__ import annotations

import copy
import dataclasses
import re
import weakref
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import pairwise
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mixadapters.core.adapter import Adapter, Site
from mixadapters.core.calls import ModelCalls
from mixadapters.core.config import MixtureConfig
from mixadapters.core.context import ForwardContext
from mixadapters.core.inspection import RoutingVerbs
from mixadapters.core.layer import AdapterHost, HookedLayer, MixtureLayer, is_pointwise
from mixadapters.core.registry import nearest
from mixadapters.core.routing import NO_LAYER
from mixadapters.core.sites import (
    ROLES,
    Tap,
    find_architecture,
    group_of,
    hidden_size_of,
    layer_index,
    stack_of,
    sublayer_of,
)

TARGET = "target"  # role of modules that the user names by target_modules


class MixtureModel(ModelCalls, RoutingVerbs, BaseTuner):
    """Base of the tuners. Class attributes of a method:

    prefix: its type's name in lower case and "_" (set by registration).
    fields: batch fields that its adapters read, taken off the forward of the base model.
    attachment: MixtureLayer (wraps) or HookedLayer (keeps the keys of the base model).
    """

    tuner_layer_cls = AdapterHost
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    fields: tuple[str, ...] = ()
    attachment: type[MixtureLayer] | type[HookedLayer] = MixtureLayer

    # --- what a method writes ---------------------------------------------------------------------------------

    def roles(self, config: Any) -> tuple[str, ...]:
        """Roles (see `core.sites`) of the modules that take an adapter, where the user names none."""
        raise NotImplementedError

    def taps(self, config: Any) -> tuple[str, ...]:
        """Roles of the modules in the same layer whose input the adapters read."""
        return ()

    def build(self, config: Any, site: Site) -> Adapter | None:
        """The adapter for one site; None where there is nothing to add."""
        raise NotImplementedError

    def known_roles(self, config: MixtureConfig) -> set[str]:
        """The roles that have modules here: those of `sites`, or of the architecture."""
        if config.sites is not None:
            return set(config.sites)
        row = find_architecture(self.get_model_config(self.model).get("model_type", "custom"))
        return {role for role in ROLES if getattr(row, role) is not None}

    # --- verbs ------------------------------------------------------------------------------------------------

    def hosts(self) -> Iterator[AdapterHost]:
        """The layers of this model that hold adapters."""
        return (module for module in self._outside() if isinstance(module, AdapterHost))

    def _outside(self) -> Iterator[nn.Module]:
        """The modules of this model, as `modules()` gives them, without those inside adapters: there may be many."""
        seen: set[nn.Module] = set()
        waiting: list[nn.Module] = [self.model]
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                yield module
                children = [child for child in module._modules.values() if child is not None]
                if isinstance(module, AdapterHost):
                    children.remove(module.adapters)
                waiting += reversed(children)

    @property
    def stage(self) -> dict[str, str]:
        """Adapter name -> the stage that it was set to. The others train as a whole."""
        return self.__dict__.setdefault("_stage", {})

    def set_stage(self, stage: str, adapter_name: str = "default") -> None:
        """Train the parameters of one stage of a method, freeze the rest of the adapter and its saved modules.

        Raises:
            ValueError: unknown adapter or stage, or a stage without a parameter in this model.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} is unknown; have {list(self.peft_config)}")
        stages = type(self.peft_config[adapter_name]).stages
        if stage not in stages:
            raise ValueError(f"stage={stage!r} is unknown; have {list(stages)}.{nearest(stage, stages)}")
        chosen = list(self._stage_parameters(stages[stage], adapter_name))
        if not any(matches for _, matches in chosen):
            raise ValueError(f"stage={stage!r} trains nothing: no parameter of {adapter_name!r} is in {stages[stage]}")
        for parameter, matches in chosen:
            parameter.requires_grad_(matches)
        self.stage[adapter_name] = stage

    def _stage_parameters(self, patterns: tuple[str, ...], adapter_name: str) -> Iterator[tuple[nn.Parameter, bool]]:
        for host in self.hosts():
            if adapter_name in host.adapters:
                for name, parameter in host.adapters[adapter_name].named_parameters():
                    wanted = any(fnmatch(name, pattern) for pattern in patterns)
                    yield parameter, wanted and not any(fnmatch(name, p[1:]) for p in patterns if p[0] == "!")
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                for name, parameter in module.named_parameters():
                    if f".{adapter_name}." in f".{name}":
                        yield parameter, "modules_to_save" in patterns

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        if not inference_mode:
            self._keep_stages([adapter_name] if isinstance(adapter_name, str) else adapter_name)

    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()
        self._keep_stages(self.active_adapters)

    def _keep_stages(self, names: list[str]) -> None:
        """PEFT makes active adapters trainable as a whole: freeze again what their stages do not train."""
        for name, stage in self.stage.items():
            if name in names:
                self.set_stage(stage, name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.context.hosted.discard(adapter_name)
        self.stage.pop(adapter_name, None)

    # --- injection --------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self._own_config(adapter_name)
        given = {f.name: copy.deepcopy(getattr(config, f.name)) for f in dataclasses.fields(config)}
        had_context = ForwardContext.find(model) is not None
        context = ForwardContext.of(model)
        context.fields.update(self.fields)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            if not had_context and not any(self.hosts()):
                context.detach(model)
            raise
        finally:
            filled = {name: value for name, value in given.items() if getattr(config, name) != value}
            config._used = (weakref.ref(model), adapter_name, filled)

    def _own_config(self, adapter_name: str) -> Any:
        """The config of an adapter, shared with no other adapter: some of its fields are filled in for this model.

        PEFT keeps the caller's object. If that is in use already, the earlier model goes on with a copy, and here the
        fields are as they were given; a second adapter of the same model takes the copy.
        """
        config = self.peft_config[adapter_name]
        if any(c is config for name, c in self.peft_config.items() if name != adapter_name):
            config = self.peft_config[adapter_name] = copy.deepcopy(config)
        elif config._used is not None:
            user, name, filled = config._used
            configs = getattr(user(), "peft_config", {})
            if configs.get(name) is config:
                configs[name] = copy.deepcopy(config)
            for field, value in filled.items():
                setattr(config, field, value)
        return config

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        config: MixtureConfig = peft_config
        if config.sites is None and config.target_modules is None:
            row = find_architecture(model_config.get("model_type", "custom"))
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
            union = "|".join(f"(?:{config.sites[role]})" for role in self.roles(config))
            if config.target_modules not in (None, union):
                raise ValueError("give either `sites` or `target_modules`, not both")
            config.target_modules = union
        self._refuse_unmatched(config)
        self._refuse_nested(config)
        return config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        layers = peft_config.layers_to_transform
        matched = found is True or isinstance(found, re.Match)
        if matched and peft_config.sites is not None and layers is not None:
            return layer_index(key) in ([layers] if isinstance(layers, int) else layers)
        return found

    def _refuse_unmatched(self, config: MixtureConfig) -> None:
        """PEFT passes over a suffix that matches nothing as long as another one matches."""
        if isinstance(config.target_modules, str) or config.target_modules is None:
            return
        names = [re.sub(r"(^|\.)base_layer(?=\.|$)", "", name) for name, _ in self.model.named_modules()]
        for target in sorted(config.target_modules):
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise ValueError(
                    f"target_modules={sorted(config.target_modules)}: no module of the model is called {target!r}."
                    f"{nearest(target, {name.rpartition('.')[2] for name in names})}"
                )

    def _refuse_nested(self, config: MixtureConfig) -> None:
        """Sites inside sites would be lost on unload and skipped by later adapters."""
        existing = {host.path for host in self.hosts()}
        names = (re.sub(r"(^|\.)base_layer(?=\.|$)", "", name) for name, _ in self.model.named_modules())
        wanted = {
            n
            for n in names
            if n and self._check_target_module_exists(config, n) and not inside_adapters(n, self.prefix)
        }
        places = sorted(existing | wanted)
        for outer, inner in pairwise(places):
            if inner.startswith(f"{outer}.") and (inner in wanted or outer in wanted):
                raise ValueError(
                    f"{inner!r} lies inside {outer!r}, and both would hold adapters; target one of them, or use "
                    "exclude_modules"
                )

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **_: Any,
    ) -> None:  # fmt: skip
        host = target if isinstance(target, MixtureLayer) else getattr(target, HookedLayer.attribute, None)
        base = host.get_base_layer() if isinstance(host, AdapterHost) else target
        site = self._site(peft_config, adapter_name, base, current_key)
        adapter = self.build(peft_config, site)
        if adapter is None:
            return
        adapter.bind(site)
        for _role, path in site.taps:
            Tap.attach(self._unwrapped(path), path, self.context)
        if not isinstance(host, AdapterHost):
            host = self.attachment(
                target, self.context, self.prefix, current_key, site.in_features, site.out_features,
                **get_quantization_kwargs(self.model),
            )  # fmt: skip
            host._active_adapter = list(self.active_adapters)
            if isinstance(host, MixtureLayer):
                setattr(parent, target_name, host)
        host.add(adapter_name, adapter, inference_mode=peft_config.inference_mode)

    def _unwrapped(self, path: str) -> nn.Module:
        module = self.model
        for part in path.split("."):
            module = getattr(module, part)
            while hasattr(module, "base_layer"):
                module = module.base_layer
        return module

    def _site(self, config: MixtureConfig, adapter_name: str, base: nn.Module, path: str) -> Site:
        role = TARGET
        if config.sites is not None:
            role = next(r for r in self.roles(config) if re.fullmatch(config.sites[r], path))
        width_in, width_out = self._widths(config, base, path)
        stack = stack_of(path, self.model)
        taps = tuple((r, self._nearest_tap(config.sites[r], path)) for r in self.taps(config)) if config.sites else ()
        layer = layer_index(path)
        return Site(
            role, path, width_in, width_out, stack, self._is_causal(stack), taps,
            adapter=adapter_name, group=self._group(role, path), layer=NO_LAYER if layer is None else layer,
        )  # fmt: skip

    def _group(self, role: str, path: str) -> str:
        if role != TARGET:
            return group_of(role)
        try:
            row = find_architecture(self.get_model_config(self.model).get("model_type", "custom"))
        except ValueError:
            row = None
        return sublayer_of(path, row)

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
            return weight.shape[0], weight.shape[0]
        width = config.hidden_size or hidden_size_of(getattr(self.model, "config", None))
        if width is None:
            raise ValueError(f"cannot tell the width of {path!r} ({type(base).__name__}); pass hidden_size")
        return width, width

    def _is_causal(self, stack: str) -> bool:
        if stack:
            return stack == "decoder"
        model_config = self.get_model_config(self.model)
        try:
            causal = find_architecture(model_config.get("model_type", "custom")).causal
        except ValueError:
            causal = False
        return causal or bool(model_config.get("is_decoder")) or "CausalLM" in type(self.model).__name__

    def _nearest_tap(self, pattern: str, path: str) -> str:
        """The module that matches `pattern` and shares the longest path with `path`."""
        names = (re.sub(r"\.base_layer(?=\.|$)", "", name) for name, _ in self.model.named_modules())
        matching = [name for name in names if re.fullmatch(pattern, name)]
        if not matching:
            raise ValueError(f"no module matches {pattern!r}, whose input the adapter at {path!r} reads")

        def shared(name: str) -> int:
            pairs = zip(name.split("."), path.split("."), strict=False)
            return next((i for i, (a, b) in enumerate(pairs) if a != b), 0)

        return max(matching, key=shared)

    def rank_at(self, config: Any, path: str, default: int) -> int:
        """The rank for a site: `rank_pattern` first."""
        return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), path), default)

    # --- saving, unloading ---------------------------------------------------------------------------

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, HookedLayer):
            child.remove()
        else:  # PEFT's own would copy child.weight, which blocks do not have
            setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for host in self.hosts():
            host.folded([n for n in host.active_adapters if n in host.adapters and n not in host.merged_adapters])

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        context = self.context
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        context.detach(model)
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The name follows `<prefix>adapters`, however deep the parameter lies."""
        before, found, after = key.partition(f".{cls.prefix}adapters.{adapter_name}.")
        if found:
            return f"{before}.{cls.prefix}adapters.{after}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's mapping; weights that are missing or left over are an error, not a warning."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        mark = f"{cls.prefix}adapters."
        wanted = {k for k in model.state_dict() if f"{mark}{adapter_name}." in k}
        given = {k for k in remapped if mark in k}
        if missing := sorted(wanted - given):
            raise ValueError(
                f"the file holds {len(wanted) - len(missing)} of {len(wanted)} weights of adapter {adapter_name!r}: "
                f"{missing[0]!r} is missing. Was it saved from another base model or with another config?"
            )
        saved = {k for k in remapped if any(f".{module}." in k for module in config.modules_to_save or ())}
        if extra := sorted((given - wanted) | (saved - model.state_dict().keys())):
            raise ValueError(
                f"the file holds {len(extra)} weights that adapter {adapter_name!r} has no place for, such as "
                f"{extra[0]!r}. Was it saved from another base model or with another config?"
            )
        return remapped


def inside_adapters(name: str, prefix: str) -> bool:
    return any(part.startswith(prefix) or part == HookedLayer.attribute for part in name.split("."))
