"""Puts a method's adapters into a model, or leaves the model as it was."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from mixadapters.core.absent import (
    module_names,
    refuse_exceptions,
    refuse_layers,
    refuse_sites,
    refuse_targets,
    refuse_task,
    refuse_tokens,
)
from mixadapters.core.adapter import Adapter, Site
from mixadapters.core.config import MixtureConfig
from mixadapters.core.context import ForwardContext
from mixadapters.core.fields import check_fields
from mixadapters.core.files import PREFIX, SavedAdapter, being_loaded
from mixadapters.core.finding import SiteFinder, Unchanging
from mixadapters.core.layer import AdapterHost, HookedLayer, MixtureLayer
from mixadapters.core.names import check_apart, check_name
from mixadapters.core.saving import (
    check_keys,
    check_shapes,
    embedding_keys,
    head_shapes,
    other_kind,
    outside_state,
    token_keys,
)
from mixadapters.core.sites import tokens_first
from mixadapters.core.taps import Tap
from mixadapters.core.walking import outside_adapters


class Injection(SiteFinder):
    """How adapters come into a model. A method writes `build`; the others are there to be extended."""

    fields: tuple[str, ...] = ()
    attachment: type[MixtureLayer] | type[HookedLayer] = MixtureLayer
    moving: tuple[str, ...] = ()  # fields of the config that verbs change later

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, which writes the config over that of an adapter of the name before it looks at anything."""
        refuse_within(model)
        refuse_taken(model, adapter_name, BaseTunerLayer)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def build(self, config: Any, site: Site) -> Adapter | None:
        """The adapter for one site; None where there is nothing to add."""
        raise NotImplementedError

    def before_injection(self, config: Any, adapter_name: str) -> None:
        """Last checks, with a resolved config and before any module is changed."""
        saved = being_loaded()
        if saved is not None and saved.shapes and not saved.mapped:
            self._check_file(config, adapter_name, saved)
        if saved is not None and saved.other is not None:
            raise ValueError(saved.other)
        beside = config.trained_beside or {}
        for name, kind in beside.items():
            other = self.peft_config.get(name)
            if saved is not None and (other is None or other.peft_type.value != kind):
                raise ValueError(
                    f"this adapter was trained beside {beside}, and the model has no {kind} adapter {name!r}: put it "
                    "into the base model first (inject_adapter_in_model), or take `trained_beside` out of "
                    "adapter_config.json to go without"
                )

    def _check_file(self, config: Any, adapter_name: str, saved: SavedAdapter) -> None:
        """Compare a file's header with what the config makes of this model, at no cost in memory."""
        own: dict[str, tuple[int, ...]] = {}
        real: set[str] = set()
        with torch.device("meta"):
            for path in self.matched(config):
                adapter = self.build(config, self._site(config, adapter_name, self._unwrapped(path), path))
                if adapter is not None:
                    where = f"{path}.{HookedLayer.attribute}" if self.attachment is HookedLayer else path
                    state = adapter.state_dict()
                    mine = {f"{where}.{self.prefix}adapters.{key}": tensor for key, tensor in state.items()}
                    own |= {key: tuple(tensor.shape) for key, tensor in mine.items()}
                    real |= {key for key, tensor in mine.items() if tensor.is_floating_point()}
        heads = head_shapes(self.model, config)
        given = saved.plain_shapes()
        beside = embedding_keys(self.model)
        here = outside_state(self.model, beside & given.keys())
        check_keys(adapter_name, given, set(own) | set(heads), beside | token_keys(config, given))
        wanted = {key: tuple(tensor.shape) for key, tensor in here.items()} | own | heads
        check_shapes(adapter_name, given, wanted)
        for key, dtype in saved.not_real.items():
            if (plain := key.removeprefix(PREFIX)) in real:
                raise other_kind(adapter_name, plain, dtype)

    def after_injection(self, config: Any, adapter_name: str) -> None:
        """The adapters sit at their sites; what raises here has them taken out again."""

    def place(self, config: Any, adapter_name: str, path: str) -> None:
        """Put an adapter of `config` at the module `path` of the model, where the method has one for it."""
        parent, _, child = path.rpartition(".")
        owner = self.model.get_submodule(parent)
        target = getattr(owner, child)
        host = self._host_within(target)
        base = host.get_base_layer() if isinstance(host, AdapterHost) else self._unwrapped(path)
        site = self._site(config, adapter_name, base, path)
        adapter = self.build(config, site)
        if adapter is None:
            return
        self._refuse_offloaded(base, path)
        if getattr(base, "_is_hooked", False):  # as transformers marks what it has shared out
            raise ValueError(
                f"{path!r} is shared out by tensor parallelism, so that its input or output is a part of what an "
                "adapter needs: place adapters at whole blocks (an FFN), or load the model without tp_plan"
            )
        adapter.bind(site)
        for _role, tapped in site.taps:
            Tap.attach(self._unwrapped(tapped), tapped, self.context, tokens_first(tapped, self.model))
        if not isinstance(host, AdapterHost):
            host = self.attachment(
                target, self.context, self.prefix, path, site.in_features, site.out_features,
                **get_quantization_kwargs(self.model),
            )  # fmt: skip
            host._active_adapter = list(self.active_adapters)
            host.lies(site.stack, tokens_first(path, self.model))
            if isinstance(host, MixtureLayer):
                setattr(owner, child, host)
        host.add(adapter_name, adapter, inference_mode=config.inference_mode)

    def _host_within(self, module: nn.Module) -> AdapterHost | None:
        """The layer of this type at a module, which layers of other types may have wrapped; None: there is none."""
        while isinstance(module, BaseTunerLayer):
            if isinstance(module, MixtureLayer) and module.prefix == self.prefix:
                return module
            module = getattr(module, "base_layer", None)
        return getattr(module, HookedLayer.attribute, None)

    def _remove_host(self, host: AdapterHost) -> None:
        """Leave the module of a host as it was without it; layers of other types around it stay."""
        path, _, child = host.path.rpartition(".")
        owner = self.model.get_submodule(path)
        inside = getattr(owner, child)
        while inside is not host and isinstance(inside, BaseTunerLayer):
            owner, child, inside = inside, "base_layer", inside.base_layer
        within = host.base_layer if isinstance(host, MixtureLayer) else host.get_base_layer()
        self._replace_module(owner, child, within, host)

    def _refuse_offloaded(self, base: nn.Module, path: str) -> None:
        if not any(p.is_meta for p in own_parameters(base)):
            return
        # A model that is nothing but shapes is no offloaded one, whose modules accelerate has marked.
        marked = any(hasattr(module, "_hf_hook") for module in self.model.modules())
        if marked or not all(p.is_meta for p in own_parameters(self.model)):
            raise ValueError(
                f"{path!r} is offloaded: its weights are on the meta device, and so would be the adapter, with "
                "nothing in it. Load the model without offloading (no disk or cpu in device_map)"
            )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; and where it fails, the model is as it was before."""
        config = self._own_config(adapter_name)
        given = {f.name: copy.deepcopy(getattr(config, f.name)) for f in dataclasses.fields(config)}
        had_context = ForwardContext.find(model) is not None
        # Those of other adapters PEFT puts back itself.
        trained = [(parameter, parameter.requires_grad) for parameter in own_parameters(model)]
        places = self.placed(adapter_name)
        hosts = set(self.hosts())
        context = ForwardContext.of(model)
        self._injecting = adapter_name
        try:
            self._unchanging = Unchanging(self.get_model_config(model), module_names(model))
            refuse_closed(hosts)
            self._check_name(adapter_name)
            context.fields.update(self.fields)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._check_parts(adapter_name)
            self.after_injection(config, adapter_name)
        except Exception:
            self._withdraw(adapter_name, places, hosts)
            for parameter, needed in trained:
                parameter.requires_grad_(needed)
            if not had_context and not any(self.hosts()):
                context.detach(model)
            raise
        finally:
            self._unchanging = None
            filled = {n: v for n, v in given.items() if n in self.moving or getattr(config, n) != v}
            config._used = (weakref.ref(model), adapter_name, filled)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        check_fields(peft_config)  # again: they may have been set since
        peft_config = self.name_all_linear(peft_config)
        named = peft_config.sites
        self.resolve(peft_config, model_config)
        self._refuse_what_is_not_there(peft_config, named)
        self._refuse_nested(peft_config)
        self._refuse_unfollowed(peft_config)
        self.before_injection(peft_config, self._injecting)
        return peft_config

    def _refuse_what_is_not_there(self, config: MixtureConfig, named: dict[str, str] | None) -> None:
        """Refuse what the config names and the model does not have; named: the `sites` that its user has given.

        A saved adapter may name more than it uses: its keys and shapes say what it is.
        """
        made_here = being_loaded() is None
        refuse_task(config.task_type, self.model)
        if named is not None and made_here:
            refuse_sites(named, (*self.roles(config), *self.taps(config)), self.model)
        if config.sites is None:
            refuse_targets(config.target_modules, self.model)
        refuse_layers(config, self.model)
        refuse_tokens(config.trainable_token_indices, self.model, strict=made_here)
        if made_here:
            refuse_exceptions(config, self.model, self.ranked(config))

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **_: Any,
    ) -> None:  # fmt: skip
        self.place(peft_config, adapter_name, current_key)

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

    def _withdraw(self, adapter_name: str, before: dict[AdapterHost, nn.Module], hosts: set[AdapterHost]) -> None:
        """Undo what an injection that failed has done; before: adapters that had the name; hosts: that there were."""
        for host in list(self.hosts()):
            if host in before:
                host.adapters[adapter_name] = before[host]
            elif adapter_name in host.adapters:
                del host.adapters[adapter_name]
                if host not in hosts:
                    self._remove_host(host)
        if before:
            return
        self.context.hosted.discard(adapter_name)
        self.peft_config.pop(adapter_name, None)  # transformers leaves it there
        for path, module in list(outside_adapters(self.model)):
            if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
                module.delete_adapter(adapter_name, new_active_adapters=None)
                if not module._adapters:
                    parent, _, child = path.rpartition(".")
                    setattr(self.model.get_submodule(parent), child, module.original_module)

    def _check_name(self, adapter_name: str) -> None:
        """Refuse a name that can be none, or that another adapter has or holds in its keys. Nothing is changed yet."""
        check_name("adapter_name", adapter_name, self.prefix)
        refuse_taken(self.model, adapter_name, BaseTunerLayer)
        others = [name for name in self.peft_config if name != adapter_name]
        own = (host for host in self.hosts() if host.prefix == self.prefix)
        found = (pair for host in own for pair in host.adapters.items() if pair[0] != adapter_name)
        keys = {other: {adapter_name} for other, adapter in found if holds(adapter, adapter_name)}
        check_apart(adapter_name, others, base_parts(self.model), keys)

    def _check_parts(self, adapter_name: str) -> None:
        """Refuse an adapter, which is in the model, whose keys hold the name of another one."""
        own = (adapter for host, adapter in self.placed(adapter_name).items() if host.prefix == self.prefix)
        keys = (key for adapter in own for key in adapter.state_dict())
        parts = {part for key in keys for part in key.split(".")}
        check_apart(adapter_name, self.peft_config.keys() - {adapter_name}, set(), {adapter_name: parts})


def refuse_within(model: nn.Module) -> None:
    """Refuse a PeftModel as the base of another: its adapters' files would name modules that no base model has."""
    if isinstance(model, PeftModel):
        kinds = {name: getattr(config.peft_type, "value", None) for name, config in model.peft_config.items()}
        raise ValueError(
            f"this model is a PeftModel already, with the adapters {kinds}: add one of the same type under another "
            "name by model.add_adapter(name, config). Of two types, inject the first into the base model "
            "(inject_adapter_in_model) before get_peft_model; to begin anew, give get_peft_model what model.unload() "
            "returns"
        )


def refuse_taken(model: nn.Module, adapter_name: str, among: type) -> None:
    """Refuse the name of an adapter that the model has: one of the two would be lost, at once or when it is saved.

    among: the type of the layers that are asked.
    """
    outside = [module for _, module in outside_adapters(model)]
    # PEFT's own in wrappers of saved modules, which have the names of those that they belong to.
    parts = {part for m in outside if isinstance(m, AuxiliaryTrainingWrapper) for part in m.children()}
    for module in outside:
        taken = isinstance(module, among) and module not in parts
        if taken and adapter_name in module._all_available_adapter_names():
            host = isinstance(module, AdapterHost)
            kind = module.prefix.rstrip("_").upper() if host else f"{type(module).__module__}.{type(module).__name__}"
            raise ValueError(
                f"adapter_name={adapter_name!r} is the name of an adapter ({kind}) that this model has already, and "
                "one of the two would be lost: give another adapter_name; or to begin anew, call unload() of the "
                "PeftModel or load the base model again"
            )


def refuse_closed(hosts: Iterable[AdapterHost]) -> None:
    """Refuse an adapter where a layer says that none may come now (`closed`), as in an `ExpertRing`."""
    for host in hosts:
        if host.closed is not None:
            raise RuntimeError(host.closed)


def own_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model outside its adapters."""
    return (parameter for _, module in outside_adapters(model) for parameter in module.parameters(recurse=False))


def holds(adapter: nn.Module, part: str) -> bool:
    """Whether a key of the adapter has this part. By names alone: there may be many adapters to ask."""
    waiting = [adapter]
    while waiting:
        module = waiting.pop()
        kept = part in module._buffers and part not in module._non_persistent_buffers_set
        if kept or part in module._modules or part in module._parameters:
            return True
        waiting += filter(None, module._modules.values())
    return False


def base_parts(model: nn.Module) -> set[str]:
    """Parts of the base model's keys, with PEFT's own before them."""
    found, waiting = {"base_model", "model"}, [model]
    while waiting:
        module = waiting.pop()
        found.update((*module._parameters, *module._buffers))
        for name, child in module._modules.items():
            adapters = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
            if child is not None and (not adapters or name in ("base_layer", "original_module")):
                found.add(name)
                waiting.append(child)
    return found
