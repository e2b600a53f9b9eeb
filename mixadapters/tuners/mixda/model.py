from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft.config import PeftConfig
from peft.utils import load_peft_weights
from torch import Tensor

from mixadapters.core.adapter import Adapter, Chain, Site
from mixadapters.core.bank import AdapterBank
from mixadapters.core.files import read_adapter
from mixadapters.core.finding import inside_adapters
from mixadapters.core.mixture import Mixture
from mixadapters.core.model import MixtureModel
from mixadapters.core.registry import nearest
from mixadapters.core.routes import HardRoutes
from mixadapters.core.sites import layer_index, stack_of
from mixadapters.tuners.bottleneck.config import placement_roles
from mixadapters.tuners.bottleneck.model import EXPERT, bottleneck
from mixadapters.tuners.mixda.config import MixDAConfig
from mixadapters.tuners.mixda.router import mixture_router, require_surgery, trial_router

NEW_ARM_SHARE = 0.05  # of the frozen arm's mass that a domain added later starts with


class MixDAModel(MixtureModel):
    fields = ("domain_ids", "prompt_mask")

    # --- sites ------------------------------------------------------------------------------------------------

    def domain_role(self, config: MixDAConfig) -> str:
        return placement_roles("parallel", config.adapter_input, self.known_roles(config))[0]

    def roles(self, config: MixDAConfig) -> tuple[str, ...]:
        domain = self.domain_role(config)
        if config.task_adapter is None:
            return (domain,)
        # Task adapters of the FFN share the domain adapters' module.
        task = placement_roles(config.task_adapter, "ffn_input", self.known_roles(config))
        return tuple(dict.fromkeys((domain, *(role for role in task if not role.startswith("ffn")))))

    def taps(self, config: MixDAConfig) -> tuple[str, ...]:
        reads_input = "ffn_input" in (config.adapter_input, config.gate_input) or config.task_adapter == "parallel"
        return ("ffn_input",) if reads_input and self.domain_role(config) == "ffn_output" else ()

    def _domain_paths(self, config: MixDAConfig) -> list[str]:
        """Modules that can hold domain adapters, by name."""
        names = (re.sub(r"(^|\.)base_layer(?=\.|$)", "", name) for name, _ in self.model.named_modules())
        # A wrapped module and its `base_layer` have one name between them.
        outside = [n for n in dict.fromkeys(names) if n and not inside_adapters(n, self.prefix)]
        chosen = [n for n in outside if self._check_target_module_exists(config, n)]
        if config.sites is None:
            return chosen
        return [n for n in chosen if re.fullmatch(config.sites[self.domain_role(config)], n)]

    def _new_ranks(self, config: MixDAConfig, rank: int | None = None) -> dict[str, int]:
        """{module: rank} of a new domain."""
        paths = self._domain_paths(config)
        depth: dict[str, int] = {}  # of the whole model, whichever layers are chosen
        for path in self._domain_paths(replace(config, layers_to_transform=None, layers_pattern=None)):
            stack = stack_of(path, self.model)
            depth[stack] = max(depth.get(stack, 0), (layer_index(path) or 0) + 1)
        chosen = {}
        for path in paths:
            index = layer_index(path)
            named = config.sites is None and config.domain_layers is None  # the user has chosen the modules
            if named or index is None or index in config.layers(depth[stack_of(path, self.model)]):
                width, _ = self._bank_widths(config, path)
                default = rank or config.r or max(1, int(width // config.reduction_factor))
                chosen[path] = self.rank_at(config, path, default)
        if not chosen:
            raise ValueError(
                f"domain_layers={config.domain_layers} and layers_to_transform={config.layers_to_transform} leave no "
                f"place for domain adapters; their sites are {self._domain_paths(config)}"
            )
        return chosen

    def _bank_widths(self, config: MixDAConfig, path: str) -> tuple[int, int]:
        """Widths in and out of domain adapters at `path`."""
        width_in, width_out = self._widths(config, self._unwrapped(path), path)
        tapped = config.sites is not None and config.adapter_input == "ffn_input" and bool(self.taps(config))
        return (width_out if tapped else width_in), width_out

    # --- injection --------------------------------------------------------------------------------------------

    def resolve(self, config: MixDAConfig, model_config: dict[str, Any]) -> None:
        super().resolve(config, model_config)
        if config.sites is None and config.gate_input == "ffn_input" and config.adapter_input != "ffn_input":
            raise ValueError(
                "gate_input='ffn_input' with target_modules: there is no telling where the FFN's input is; pass "
                "sites={'ffn_output': ..., 'ffn_input': ...} instead, or leave gate_input=None"
            )

    def before_injection(self, config: MixDAConfig, adapter_name: str) -> None:
        self._gathered: dict[str, dict[str, dict[str, Tensor]]] = {}
        trial = trial_router(config, list(config.domains)) if config.domains else None
        for name, spec in config.domains.items():
            if "source" in spec:
                self._gathered[name] = self._read_source(config, name, spec)
                spec["ranks"] = {path: w["down.weight"].shape[0] for path, w in self._gathered[name].items()}
            elif "ranks" not in spec:
                spec["ranks"] = self._new_ranks(config)
            if getattr(trial, "granularity", None) == "sequence":
                self._refuse_causal(list(spec["ranks"]))
        super().before_injection(config, adapter_name)

    def after_injection(self, config: MixDAConfig, adapter_name: str) -> None:
        super().after_injection(config, adapter_name)
        for name, weights in self._gathered.items():
            self._fill(adapter_name, name, weights)
        self._gathered = {}

    def _refuse_causal(self, paths: list[str]) -> None:
        for path in paths:
            if self._is_causal(stack_of(path, self.model)):
                raise ValueError(
                    f"gate_granularity='sequence' at {path!r}: the gate of a causal decoder would see the future; "
                    "use 'token', 'causal_prefix' or 'request'"
                )

    def build(self, config: MixDAConfig, site: Site) -> Adapter | None:
        steps: dict[str, Adapter] = {}
        ranks = {name: rank for name, spec in config.domains.items() if (rank := _rank(spec["ranks"], site.path))}
        if ranks:
            steps["domain"] = self._mixture(config, site, ranks)
        if config.task_adapter is not None:
            tap = site.tap("ffn_input") if config.task_adapter == "parallel" else None
            task = bottleneck(config.task_config(), site, config.task_r or 0, tap)
            task.observes = False
            steps["task"] = task
        return Chain(**steps) if steps else None

    def _mixture(self, config: MixDAConfig, site: Site, ranks: dict[str, int]) -> Mixture:
        tap = site.tap("ffn_input")
        reads = tap if config.adapter_input == "ffn_input" else None
        width = site.in_features if reads is None else site.out_features
        bank = AdapterBank(width, site.out_features, **config.bank_options())
        for name, rank in ranks.items():
            bank.add(name, rank, config.init_weights)
        gate_tap = tap if config.gate_input == "ffn_input" and reads is None else None
        names = list(config.domains)
        router = mixture_router(
            config, site.out_features if gate_tap else width, list(ranks), _rank(config.null_arms, site.path)
        )
        self.context.fields.update(router.fields)
        return Mixture(
            router, bank, "parallel", tap=reads, router_tap=gate_tap, dropout=config.adapter_dropout, observes=True,
            hard_routes=HardRoutes("domain_ids", [names.index(name) for name in ranks], len(names)),
            replaces=config.combine == "convex",
        )  # fmt: skip

    # --- domains from elsewhere -------------------------------------------------------------------------------

    def _read_source(self, config: MixDAConfig, name: str, spec: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
        """{module of this model: {parameter of an expert: tensor}} of a trained domain adapter.

        Raises:
            ValueError: not a domain adapter, made for another base model or with other fields, or of other modules.
        """
        where = f"domains[{name!r}]: {spec['source']!r}"
        try:
            found = read_adapter(spec["source"], lambda kind: True, revision=spec.get("revision"))
            if found is not None and found.other is not None:
                raise ValueError(found.other)
            saved = PeftConfig.from_pretrained(spec["source"], revision=spec.get("revision"))
            weights = load_peft_weights(spec["source"], device="cpu", revision=spec.get("revision"))
        except (ValueError, OSError, KeyError, TypeError) as error:  # of PEFT, for what is no adapter of its types
            raise ValueError(f"{where} cannot be read as an adapter folder or hub id: {error}") from error
        expert = self._check_source(config, name, saved, where)
        self._check_base_model(saved, spec, where)
        paths = self._domain_paths(config)
        by_path: dict[str, dict[str, Tensor]] = {}
        for key, tensor in weights.items():
            path, mark, rest = key.removeprefix("base_model.model.").partition(
                f".{saved.peft_type.value.lower()}_adapters."
            )
            if not mark or not rest.startswith(expert):
                continue
            here = [p for p in paths if _same_module(p, path)]
            if len(here) != 1:
                raise ValueError(f"{where} adapts {path!r}, which is no domain site of this model; those are {paths}")
            by_path.setdefault(here[0], {})[rest.removeprefix(expert)] = tensor
        if not by_path:
            raise ValueError(f"{where} holds no weights of a domain adapter: none of its {len(weights)} keys fits")
        for path, tensors in by_path.items():
            self._check_tensors(config, path, tensors, where)
        if missing := [p for p in self._paths_of_source(saved, name, paths) if p not in by_path]:
            raise ValueError(f"{where} lacks the weights of {missing}, which its own config says that it adapts")
        return by_path

    def _paths_of_source(self, saved: Any, name: str, paths: list[str]) -> list[str]:
        """Those of our `paths` that a source adapts by its own config."""
        if saved.peft_type.value == "MIXDA":
            spec = saved.domains.get(name) or next(iter(saved.domains.values()))
            return [p for p in paths if _rank(spec.get("ranks", {}), p)]
        return [p for p in paths if saved.target_modules and self._check_target_module_exists(saved, p)]

    def _check_tensors(self, config: MixDAConfig, path: str, tensors: dict[str, Tensor], where: str) -> None:
        """Refuse tensors that are not those of an expert at `path`."""
        with torch.device("meta"):
            bank = AdapterBank(*self._bank_widths(config, path), **config.bank_options())
            bank.add("like", tensors["down.weight"].shape[0] if "down.weight" in tensors else 1)
        expected = dict(bank.experts["like"].named_parameters())
        if expected.keys() != tensors.keys():
            raise ValueError(f"{where} has {sorted(tensors)} at {path!r}, expected {sorted(expected)}")
        for key, parameter in expected.items():
            if parameter.shape != tensors[key].shape:
                raise ValueError(
                    f"{where}: {key} at {path!r} is {tuple(tensors[key].shape)} in the source, expected "
                    f"{tuple(parameter.shape)}: trained on another base model?"
                )

    def _check_source(self, config: MixDAConfig, name: str, saved: Any, where: str) -> str:
        """Refuse a source whose fields do not fit; return where its expert's parameters lie in its keys."""
        kind = getattr(saved.peft_type, "value", saved.peft_type)
        if kind == "BOTTLENECK":
            expert = f"bank.experts.{EXPERT}."
            theirs = {**saved.bank_options(), "adapter_input": saved.adapter_input, "placement": saved.placement}
            ours = {**config.bank_options(), "bias": True, "placement": "parallel"}
        elif kind == "MIXDA":
            one = next(iter(saved.domains)) if len(saved.domains) == 1 else name
            if one not in saved.domains:
                raise ValueError(
                    f"{where} has no domain {name!r}; it has {list(saved.domains)}.{nearest(name, saved.domains)}"
                )
            expert = f"domain.bank.experts.{one}."
            theirs = {**saved.bank_options(), "adapter_input": saved.adapter_input, "combine": saved.combine}
            ours = {**config.bank_options(), "combine": config.combine}
        else:
            raise ValueError(f"{where} is a {kind} adapter; domains are gathered from BOTTLENECK or MIXDA adapters")
        for field_name, value in {**ours, "adapter_input": config.adapter_input}.items():
            if theirs[field_name] != value:
                raise ValueError(
                    f"{where} was trained with {field_name}={theirs[field_name]!r}, this mixture has {value!r}"
                )
        return expert

    def _check_base_model(self, saved: Any, spec: dict[str, Any], where: str) -> None:
        theirs = saved.base_model_name_or_path
        ours = getattr(getattr(self.model, "config", None), "_name_or_path", None) or getattr(
            self.model, "name_or_path", None
        )
        if spec.get("check_base_model", True) and theirs and ours and theirs != ours:
            raise ValueError(
                f"{where} was trained on {theirs!r}, this model is {ours!r}; if they are the same, say so by "
                "{'source': ..., 'check_base_model': False}"
            )

    @torch.no_grad()
    def _fill(self, adapter_name: str, name: str, weights: dict[str, dict[str, Tensor]]) -> None:
        """Copy the weights of a gathered domain into its experts."""
        for path, tensors in weights.items():
            expert = self._host_at(path).adapters[adapter_name].domain.bank.experts[name]
            for key, parameter in expert.named_parameters():
                if parameter.is_meta:
                    raise ValueError("domains with a source need low_cpu_mem_usage=False")
                parameter.copy_(tensors[key])

    # --- domains that come and go -----------------------------------------------------------------------------

    def domain_ids(self, names: list[str], adapter_name: str = "default") -> Tensor:
        """(B,) numbers for the batch field `domain_ids`, which routes each row to a domain; "__base__" is none."""
        order = list(self._config(adapter_name).domains)
        for name in names:
            if name != "__base__" and name not in order:
                raise ValueError(f"unknown domain {name!r}; have {order}.{nearest(name, order)}")
        return torch.tensor([-1 if name == "__base__" else order.index(name) for name in names])

    @torch.no_grad()
    def add_domain(
        self,
        name: str,
        source: str | dict[str, Any] | None = None,
        *,
        r: int | None = None,
        share: float = NEW_ARM_SHARE,
        adapter_name: str = "default",
    ) -> None:
        """Add a domain, new (zero) or trained, to a mixture. The weights of the other domains do not change.

        Its arm takes `share` of what a softmax gate gives to the frozen layer (for a sigmoid gate, and at layers that
        had no gate: starts at `share`). So with combine="delta" a new domain leaves the output as it was. Make
        optimizers anew afterwards.

        Raises:
            ValueError: the name is taken, the source does not fit, or share is not between 0 and 1.
        """
        config = self._config(adapter_name)
        require_surgery(config, "add_domain")
        if name in config.domains:
            raise ValueError(f"domain {name!r} exists already; have {list(config.domains)}")
        if name in self.peft_config and name != adapter_name:
            raise ValueError(
                f"domain {name!r} has the name of another adapter of this model: PEFT would drop its weights when it "
                "saves. Choose another name"
            )
        if not 0 < share < 1:
            raise ValueError(f"share={share} must lie between 0 and 1")
        given = MixDAConfig(domains={name: source} if source is not None else [name], r=r)  # checks them
        spec = dict(given.domains[name])
        weights = self._read_source(config, name, spec) if "source" in spec else None
        if weights is None:
            spec["ranks"] = self._new_ranks(config, r)
        else:
            spec["ranks"] = {path: w["down.weight"].shape[0] for path, w in weights.items()}
        config.domains[name] = spec
        config.domain_order = list(config.domains)
        for path, rank in spec["ranks"].items():
            self._add_expert(adapter_name, path, name, rank, share)
        if weights is not None:
            self._fill(adapter_name, name, weights)
        self._renumber(adapter_name)

    def _add_expert(self, adapter_name: str, path: str, name: str, rank: int, share: float) -> None:
        config = self._config(adapter_name)
        own = (p for h in self.hosts() if adapter_name in h.adapters for p in h.adapters[adapter_name].parameters())
        dtype = next((p.dtype for p in own), None)
        host = self._host_at(path, missing_ok=True)
        new: Any
        if host is None or adapter_name not in host.adapters:
            self.place(config, adapter_name, path)
            host = self._host_at(path)
            new = host.adapters[adapter_name]
            new.domain.router.start_at(share)
        elif "domain" in (chain := host.adapters[adapter_name]).steps:
            chain.domain.bank.add(name, rank, config.init_weights)
            chain.domain.router.add_expert(name, share)
            new = chain.domain.bank.experts[name]
        else:
            site = self._site(config, adapter_name, host.get_base_layer(), path)
            new = self._mixture(config, site, {name: rank})
            new.router.start_at(share)
            host.adapters[adapter_name] = Chain(domain=new, **chain.steps)
            host.adapters[adapter_name].bind(site)
        device, base_dtype = host._get_base_layer_device_and_dtype(host.get_base_layer())
        new.to(device, dtype or base_dtype)

    def remove_domain(self, name: str, *, renormalize: bool = False, adapter_name: str = "default") -> None:
        """Remove a domain and its weights. Make optimizers anew afterwards.

        What a softmax gate gave to it goes to the frozen layer, so that the other domains' weights do not change; with
        `renormalize` it is shared out among all.

        Raises:
            ValueError: there is no such domain.
        """
        config = self._config(adapter_name)
        if name not in config.domains:
            raise ValueError(f"unknown domain {name!r}; have {list(config.domains)}.{nearest(name, config.domains)}")
        require_surgery(config, "remove_domain")
        for path, mixture in list(self._mixtures(adapter_name)):
            if name not in mixture.bank.experts:
                continue
            mixture.bank.remove(name)
            mixture.router.remove_expert(name, renormalize)
            if mixture.bank.names:
                config.null_arms[path] = getattr(mixture.router, "null_arms", 0)
            else:
                chain = self._host_at(path).adapters[adapter_name]
                del chain.domain
                config.null_arms.pop(path, None)
        config.null_arms = {path: count for path, count in config.null_arms.items() if count}
        del config.domains[name]
        config.domain_order = list(config.domains)
        self._renumber(adapter_name)

    def _renumber(self, adapter_name: str) -> None:
        names = list(self._config(adapter_name).domains)
        for _, mixture in self._mixtures(adapter_name):
            assert mixture.hard_routes is not None
            mixture.hard_routes.number([names.index(name) for name in mixture.bank.names], len(names))
        stage = self.stage.get(adapter_name)
        if self._config(adapter_name).inference_mode:
            for host in self.hosts():
                if adapter_name in host.adapters:
                    host.adapters[adapter_name].requires_grad_(False)
        elif stage is not None and names:
            self.set_stage(stage, adapter_name)

    def _config(self, adapter_name: str) -> MixDAConfig:
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} is unknown; have {list(self.peft_config)}")
        return self.peft_config[adapter_name]

    def _mixtures(self, adapter_name: str) -> Iterator[tuple[str, Mixture]]:
        for host in self.hosts():
            if adapter_name in host.adapters and "domain" in host.adapters[adapter_name].steps:
                yield host.path, host.adapters[adapter_name].domain

    def _host_at(self, path: str, missing_ok: bool = False) -> Any:
        host = next((h for h in self.hosts() if h.path == path), None)
        if host is None and not missing_ok:
            raise ValueError(f"no adapter sits at {path!r}")
        return host


def _same_module(a: str, b: str) -> bool:
    """Whether two paths name the same module of a backbone, with or without a head around it."""
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


def _rank(by_path: dict[str, int], path: str) -> int:
    return by_path.get(path) or next((n for p, n in by_path.items() if _same_module(p, path)), 0)
