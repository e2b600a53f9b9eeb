"""The tuner of PEFT that all methods share: what can be done with adapters once they are in a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from mixadapters.core.calls import ModelCalls
from mixadapters.core.cutting import CuttingVerbs
from mixadapters.core.injection import Injection
from mixadapters.core.inspection import RoutingVerbs
from mixadapters.core.layer import AdapterHost, HookedLayer, in_stage
from mixadapters.core.merging import refuse_merge
from mixadapters.core.names import UNNAMED, Unnamed, of_active
from mixadapters.core.progress import StepVerbs
from mixadapters.core.registry import nearest
from mixadapters.core.saving import SavedForm
from mixadapters.core.walking import outside_adapters


class MixtureModel(ModelCalls, Injection, SavedForm, RoutingVerbs, StepVerbs, CuttingVerbs):
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

    @property
    def single_domain(self) -> dict[str, str]:
        """Adapter name -> the only domain that trains in the stage that it was set to."""
        return self.__dict__.setdefault("_single_domain", {})

    def named(self, adapter_name: str) -> str:
        """The adapter that is meant: the active one where none is named. Raises ValueError where several are."""
        if not isinstance(adapter_name, Unnamed):
            return adapter_name
        active = list(self.active_adapters)
        if len(active) > 1:
            raise ValueError(
                f"the adapters {active} are active, so that it is not clear whose this is: pass "
                f"adapter_name={active[-1]!r}, or another of {list(self.peft_config)}"
            )
        return active[0] if active else str(adapter_name)

    def config_of(self, adapter_name: str) -> Any:
        """The config of an adapter. Raises ValueError where there is none of the name, or none is named and several
        are active."""
        adapter_name = self.named(adapter_name)
        if not isinstance(adapter_name, str) or adapter_name not in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} is unknown; have {list(self.peft_config)}")
        return self.peft_config[adapter_name]

    @of_active
    def set_stage(self, stage: str, adapter_name: str = UNNAMED, domain: str | None = None) -> None:
        """Train the parameters of one stage of a method, freeze the rest of the adapter and its saved modules.

        domain: the only one that trains; for methods that have domains.

        Raises:
            ValueError: unknown adapter, stage or domain, or a stage without a parameter in this model.
        """
        stages = type(self.config_of(adapter_name)).stages
        adapter_name = str(adapter_name)  # it stays the one that is meant, whatever is active later
        if not isinstance(stage, str) or stage not in stages:
            raise ValueError(f"stage={stage!r} is unknown; have {list(stages)}.{nearest(str(stage), stages)}")
        patterns = self.patterns_of(stage, adapter_name, domain)
        chosen = list(self._stage_parameters(patterns, adapter_name))
        if not any(matches for _, matches in chosen):
            made = {by for r in self.routers_of(adapter_name) if "router.*" in patterns and (by := r.made_by)}
            remedy = f". Its router does not train: {made.pop()}" if made else ""
            raise ValueError(
                f"stage={stage!r} trains nothing: no parameter of {adapter_name!r} is in {patterns}{remedy}"
            )
        for parameter, matches in chosen:
            parameter.requires_grad_(matches)
        self.stage[adapter_name] = stage
        self.single_domain.pop(adapter_name, None)
        if domain is not None:
            self.single_domain[adapter_name] = domain
        for host in self.hosts():
            host.stages[adapter_name] = patterns
        self.context.engine.changed()

    def patterns_of(self, stage: str, adapter_name: str, domain: str | None = None) -> tuple[str, ...]:
        """Patterns of the parameters that train in a stage. Raises ValueError for a domain that cannot train alone."""
        if domain is not None:
            kind = self.config_of(adapter_name).peft_type.value
            raise ValueError(f"domain={domain!r}: adapter {adapter_name!r} is of type {kind}, which has no domains")
        return self.peft_config[adapter_name].trained_in(stage)

    def _stage_parameters(self, patterns: tuple[str, ...], adapter_name: str) -> Iterator[tuple[nn.Parameter, bool]]:
        for adapter in self.placed(adapter_name).values():
            for name, parameter in adapter.named_parameters():
                yield parameter, in_stage(name, patterns)
        for _, module in outside_adapters(self.model):
            if isinstance(module, AuxiliaryTrainingWrapper):
                for name, parameter in module.named_parameters():
                    if f".{adapter_name}." in f".{name}":
                        yield parameter, "modules_to_save" in patterns

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._keep_stages()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._keep_stages()

    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()
        self._keep_stages()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.context.hosted.discard(adapter_name)
        self.stage.pop(adapter_name, None)
        self.single_domain.pop(adapter_name, None)
        self._keep_stages()

    def _keep_stages(self) -> None:
        """PEFT's verbs make adapters trainable as a whole, their heads included: freeze what stages do not train."""
        self.context.engine.changed()
        for name, stage in self.stage.items():
            patterns = self.patterns_of(stage, name, self.single_domain.get(name))
            for parameter, matches in self._stage_parameters(patterns, name):
                if not matches:
                    parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> MixtureModel:
        """As any module's; but frozen norms that keep running statistics (batch norm) stay in evaluation.

        They belong to the base model, which training must leave as it was: no adapter's file holds them.
        """
        super().train(mode)
        if not mode:
            return self
        outside = [module for _, module in outside_adapters(self)]
        saved = {m for part in outside if isinstance(part, AuxiliaryTrainingWrapper) for m in part.modules()}
        for module in outside:
            statistics = getattr(module, "running_mean", None) is not None
            if statistics and module not in saved and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: PEFT's LoRA has this verb, and what is not linear has no sum of weights."""
        raise NotImplementedError(
            f"{type(self).__name__} has no add_weighted_adapter: the sum of experts' weights is no sum of what they "
            "give. Let the rows of a batch name adapters (adapter_names), or have MoA mix trained ones "
            "(MoAConfig(experts={'name': 'folder'}))"
        )

    # --- saving, unloading ---------------------------------------------------------------------------

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, HookedLayer):
            child.remove()
        else:  # PEFT's own would copy child.weight, which blocks do not have
            setattr(parent, child_name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        refuse_merge(self.model, self.hosts(), adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:  # fmt: skip
        if merge:
            refuse_merge(self.model, self.hosts(), adapter_names, safe_merge)
        context = self.context
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        context.detach(model)
        return model
