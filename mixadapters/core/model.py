"""The tuner of PEFT that all methods share: what can be done with adapters once they are in a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from typing import Any, ClassVar

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from mixadapters.core.injection import Injection
from mixadapters.core.inspection import RoutingVerbs
from mixadapters.core.layer import AdapterHost, HookedLayer
from mixadapters.core.mixed import RowNames
from mixadapters.core.registry import nearest
from mixadapters.core.saving import SavedForm


class MixtureModel(Injection, SavedForm, RoutingVerbs):
    """Base of the tuners. A method writes `roles` and `build`, and may say by class attributes:

    prefix: its type's name in lower case and "_" (set by registration).
    fields: batch fields that its adapters read, taken off the forward of the base model.
    attachment: MixtureLayer (wraps) or HookedLayer (keeps the keys of the base model).
    """

    tuner_layer_cls = AdapterHost
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

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

    # --- forward, saving, unloading ---------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's, which refuses the batch fields of adapters: they hold over the whole generation."""
        held = {name: kwargs.pop(name) for name in list(kwargs) if name in self.context.own_fields}
        with self.context.pin_in_thread(**held):
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        wrappers = [m for m in self._outside() if isinstance(m, AuxiliaryTrainingWrapper)]
        known = set().union(*(h._get_available_adapters() for h in (*self.hosts(), *wrappers)))
        unknown = sorted(set(names) - known - {"__base__"})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        groups = _copies_per_row(self.model, kwargs)
        handles = []
        try:
            for wrapper in wrappers:  # PEFT's own modules take the names as an argument
                hook = partial(_pass_names, names=[n for n in names for _ in range(groups)])
                handles.append(wrapper.register_forward_pre_hook(hook, with_kwargs=True))
            with self.context.pin_in_thread(adapter_names=RowNames(names), row_groups=groups):
                yield
        finally:
            for handle in handles:
                handle.remove()

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


def _pass_names(module: nn.Module, args: tuple, kwargs: dict[str, Any], names: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": names}


def _copies_per_row(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How often `generate` repeats each row of its batch."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    said = [kwargs.get(n) or getattr(config, n, None) or 1 for n in ("num_beams", "num_return_sequences")]
    return max(said)
