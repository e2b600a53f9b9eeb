from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

from mixadapters.core.adapter import Site
from mixadapters.core.bank import AdapterBank
from mixadapters.core.files import FileWeights, being_loaded
from mixadapters.core.routes import HardRoutes
from mixadapters.core.routing import RoutingKey
from mixadapters.core.sites import layer_index, sublayer_of
from mixadapters.routers.base import Router, build_router
from mixadapters.tuners.bottleneck.config import placement_roles, placement_taps
from mixadapters.tuners.gathering import Gathered
from mixadapters.tuners.lora import default_targets
from mixadapters.tuners.moa.absent import refuse_absent
from mixadapters.tuners.moa.config import MoAConfig, stands_at
from mixadapters.tuners.moa.cutting import ExpertCutting
from mixadapters.tuners.moa.layer import ExpertMixture, FollowRouter
from mixadapters.tuners.moa.overriding import ExpertOverriding
from mixadapters.tuners.moa.router import OPTION_OF, name_router, router_spec
from mixadapters.tuners.moa.sources import gather
from mixadapters.tuners.sources import expert_options, key_of, rank_of, warn_of_unused

# What runs first in an attention.
QUERY = frozenset(
    {"q", "query", "q_proj", "q_lin", "query_proj", "qkv_proj", "qkv", "query_key_value", "in_proj", "in_proj_qkv"}
)
# Of cross-attention, these read the encoder's tokens, the others the decoder's.
MEMORY = frozenset({"k", "key", "k_proj", "v", "value", "v_proj"})
OF_NEW = ("r", "rank_pattern", "lora_alpha", "use_rslora", "alpha_pattern")  # fields of new experts
REREADING = frozenset({"kv_b_proj"})  # of latent attention (DeepSeek): in each step it reads the cache's tokens again


@dataclass
class Plan:
    """Which modules an adapter sits at, and whose router each of them goes by."""

    leader: dict[str, str] = field(default_factory=dict)  # path -> the first path of its scope
    experts: dict[str, list[str]] = field(default_factory=dict)  # leader -> the experts of its scope, in order
    routers: dict[str, Router] = field(default_factory=dict)  # leader -> its router, once it is there


class MoAModel(ExpertOverriding, ExpertCutting):
    """The tuner of MoA: where experts and routers lie, and what they are made of.

    What can be done with experts afterwards is in its bases.
    """

    fields = ("expert_ids", "prompt_mask")
    moving = ("router", "schedules", "expert_overrides", *OPTION_OF)

    # --- sites -----------------------------------------------------------------------------------

    def roles(self, config: MoAConfig) -> tuple[str, ...]:
        return placement_roles(config.placement, config.adapter_input, self.known_roles(config))

    def taps(self, config: MoAConfig) -> tuple[str, ...]:
        if config.expert_type == "lora":
            return ()
        return placement_taps(config.placement, config.adapter_input, self.known_roles(config))

    def expert_widths(self, config: MoAConfig, path: str) -> tuple[int, int]:
        """Widths in and out of an expert at `path`."""
        width_in, width_out = self._widths(config, self._unwrapped(path), path)
        reads_output = config.expert_type != "lora" and (config.placement != "parallel" or self._tapped(config))
        return (width_out if reads_output else width_in), width_out

    def _tapped(self, config: MoAConfig) -> bool:
        return config.sites is not None and bool(self.taps(config))

    def resolve(self, config: MoAConfig, model_config: dict[str, Any]) -> None:
        self._gathered: dict[str, Gathered] = {}
        if config.expert_type == "lora" and config.sites is None:
            self._gather(config)
            if config.target_modules is None and self._gathered:
                if config.layers_to_transform is not None:
                    raise ValueError(
                        f"layers_to_transform={config.layers_to_transform}: gathered experts are taken with all "
                        "layers that they adapt; leave the field out, or train them on fewer"
                    )
                config.target_modules = {path for found in self._gathered.values() for path in found.weights}
            elif config.target_modules is None:
                config.target_modules = set(default_targets(model_config.get("model_type", "custom"), self.model))
            self.name_all_linear(config)
            return
        super().resolve(config, model_config)
        self._gather(config)

    def _gather(self, config: MoAConfig) -> None:
        if not config.n_shared_experts:
            warn_of_unused(config, config.experts or {}, OF_NEW, "expert", "add_expert")
        for name, spec in (config.experts or {}).items():
            if "source" in spec:
                self._gathered[name] = found = gather(self, config, name, spec)
                spec |= {"ranks": found.ranks, "scales": found.scales}
                spec |= {"biases": found.biases} if config.expert_type == "lora" and found.biases else {}

    # --- injection -------------------------------------------------------------------------------

    def before_injection(self, config: MoAConfig, adapter_name: str) -> None:
        paths = self.matched(config)
        if config.router is None:
            reread = any(path.rpartition(".")[2] in REREADING for path in paths)  # such a layer decides by token alone
            name_router(config, not reread and all(self._is_causal(path) for path in paths))
        self._refuse_left_out(config, paths)
        self._refuse_rereading(config, paths)
        refuse_absent(config, paths, self.places())
        self._plan = self._make_plan(config, adapter_name, paths)
        super().before_injection(config, adapter_name)  # builds every layer on the meta device
        self._plan.routers.clear()

    def _refuse_left_out(self, config: MoAConfig, paths: list[str]) -> None:
        """Experts have weights at modules of their own, which the config must not leave out."""
        known = dict.fromkeys(paths)
        for name, spec in (config.experts or {}).items():
            if outside := [path for path in spec.get("ranks", {}) if key_of(known, path) is None]:
                raise ValueError(
                    f"experts[{name!r}] adapts {outside[0]!r}, which is not among the modules that target_modules, "
                    "exclude_modules and layers_to_transform leave; an expert is taken with all its modules: leave "
                    "these fields out, or train it on fewer"
                )
        if not paths:
            raise ValueError(f"Target modules {config.target_modules} not found in the base model: nothing to adapt")

    def _refuse_rereading(self, config: MoAConfig, paths: list[str]) -> None:
        """A layer that reads the tokens so far again in each step has no routing of the earlier ones to follow."""
        again = next((path for path in paths if path.rpartition(".")[2] in REREADING), None)
        by_token = router_spec(config)[1].get("granularity", "token") == "token"
        if again is None or being_loaded() is not None or (config.router_scope == "module" and by_token):
            return
        raise ValueError(
            f"{again!r} reads, in each step of generate, all tokens of the cache again, and a router that is shared "
            f"(router_scope={config.router_scope!r}) or remembers has decided on the new ones alone: leave it out "
            "(exclude_modules=['kv_b_proj']), or take router_scope='module' and granularity 'token'"
        )

    def _make_plan(self, config: MoAConfig, adapter_name: str, paths: list[str]) -> Plan:
        plan = Plan()
        first: dict[tuple[str, ...], str] = {}
        have: dict[str, set[str]] = {}
        for path in _in_running_order(paths):
            names = {*self._experts_at(config, path), *stands_at(config, path)}
            if names:
                scope = self._scope(config, adapter_name, path)
                leader = plan.leader[path] = first.setdefault(scope, path)
                have.setdefault(leader, set()).update(names)
        pieces = [piece for name in config.all_names() for piece in config.pieces(name)]
        plan.experts = {leader: [n for n in pieces if n in names] for leader, names in have.items()}
        return plan

    def _scope(self, config: MoAConfig, adapter_name: str, path: str) -> tuple[str, ...]:
        """What modules under one router have in common."""
        site = self._site(config, adapter_name, self._unwrapped(path), path)
        memory = site.group == "cross_attention" and path.rpartition(".")[2] in MEMORY
        side = "encoder" if memory else site.stack
        layer = _layer_of(path)
        if config.router_scope == "module" or not layer:  # a head reads other rows than the layers
            return (path,)
        if config.router_scope == "model":
            return (side,)
        return (layer, site.group, side) if site.group else (path,)

    def _numbered_at(self, config: MoAConfig, path: str) -> dict[str, int]:
        """{expert: rank} of the experts that have something at `path`, in the order of the config."""
        ranks: dict[str, int] = {}
        new = self.rank_at(config, path, config.r)
        for name in config.names_at(layer_index(path)):
            spec = (config.experts or {}).get(name, {})
            rank = rank_of(spec["ranks"], path) if "ranks" in spec else new
            ranks |= {name: rank} if rank else {}
        return ranks

    def _experts_at(self, config: MoAConfig, path: str) -> dict[str, int]:
        """As `_numbered_at`, of what the router chooses among: experts, or their segments."""
        ranks: dict[str, int] = {}
        for name, rank in self._numbered_at(config, path).items():
            pieces = config.pieces(name)
            if rank % len(pieces):
                raise ValueError(f"segments={config.segments} does not divide the rank {rank} of {name!r} at {path!r}")
            ranks |= dict.fromkeys(pieces, rank // len(pieces))
        return ranks

    def build(self, config: MoAConfig, site: Site) -> ExpertMixture | None:
        if site.path not in self._plan.leader:
            return None
        tap = site.tap("ffn_norm") or site.tap("ffn_input")
        width, _ = self.expert_widths(config, site.path)
        bank = AdapterBank(width, site.out_features, **config.bank_options())
        name_of = {piece: name for name in config.all_names() for piece in config.pieces(name)}
        for piece, rank in self._experts_at(config, site.path).items():
            options = self._expert_options(config, site.path, name_of[piece], rank)
            bank.add(piece, rank, config.init_weights, **options)
        for i in range(config.n_shared_experts):
            rank = self.rank_at(config, site.path, config.r)
            bank.add(f"shared{i}", rank, config.init_weights, scale=config.scale_at(site.path, rank))
        router = self._router(config, site, width)
        number_of = {piece: number for number, piece in enumerate(name_of)}
        self.context.fields.update(router.fields)
        parallel = config.expert_type == "lora" or config.placement == "parallel"
        return ExpertMixture(
            router, bank, "parallel" if parallel else "sequential", tap=tap, dropout=config.lora_dropout,
            hard_routes=HardRoutes("expert_ids", [number_of[n] for n in router.experts], len(number_of)),
            shared=config.n_shared_experts, residual=config.residual, observes=True,
            stands=stands_at(config, site.path),
        )  # fmt: skip

    def _expert_options(self, config: MoAConfig, path: str, name: str, rank: int) -> dict[str, Any]:
        """Arguments of `AdapterBank.add` for the expert `name`, or a segment of it, of this rank."""
        gathered = expert_options((config.experts or {}).get(name, {}), path)
        return gathered or {"scale": config.scale_at(path, rank * config.segments)}

    def _router(self, config: MoAConfig, site: Site, width: int) -> Router:
        leader = self._plan.leader[site.path]
        if leader not in self._plan.routers:  # the leader of an attention may be defined after others
            at, _ = self.expert_widths(config, leader)
            nulls = config.num_null_experts + rank_of(config.null_arms, leader)
            first = next(iter(self._plan.routers.values()), None)
            self._plan.routers[leader] = self.make_router(config, at, self._plan.experts[leader], nulls, first)
        router = self._plan.routers[leader]
        if leader == site.path:
            return router
        key = self._site(config, site.adapter, self._unwrapped(leader), leader)
        return FollowRouter(width, router, RoutingKey(key.adapter, key.group, key.layer, key.path))

    def make_router(
        self, config: MoAConfig, width: int, experts: list[str], nulls: int = 0, first: Router | None = None
    ) -> Router:
        """The router of one scope.

        nulls: arms without expert. first: the model's first router, with which others may share a part.
        """
        cls, options = router_spec(config)
        options |= {"null_arms": nulls} if nulls else {}
        everyone = [piece for name in config.all_names() for piece in config.pieces(name)]
        options = cls.among(options, experts, everyone)
        if "k" in options:
            options["k"] = self.chosen(config, len(experts) + options.get("null_arms", cls.usual_null_arms))
        vocabulary = self._known_tokens()
        defaults = {} if vocabulary is None else {"vocab_size": vocabulary}
        assert isinstance(config.router, dict)
        return build_router({"kind": config.router["kind"], **options}, width, experts, first=first, **defaults)

    def chosen(self, config: MoAConfig, arms: int) -> int:
        """How many of `arms` a token uses: layers may have fewer experts than the config asks for."""
        k = router_spec(config)[1]["k"]
        return arms if k is None else min(k, arms)

    def after_injection(self, config: MoAConfig, adapter_name: str) -> None:
        super().after_injection(config, adapter_name)
        for name, found in self._gathered.items():
            self.fill(adapter_name, name, found)
        self.fit_router(adapter_name, missing_ok=True)
        self.set_trainable(adapter_name)
        self._gathered = {}
        if config.schedules:
            self.set_schedules(config.schedules, adapter_name)
        self.apply_overrides(adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As every tuner's; options that both configs have on a schedule become what they are in the file."""
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        saved = state_dict.saved if isinstance(state_dict, FileWeights) else None
        if saved is not None and config.schedules:
            theirs: Any = PeftConfig.from_peft_type(**{k: v for k, v in saved.config.items() if k != "auto_mapping"})
            now = {name: theirs.option_now(name) for name in config.schedules.keys() & theirs.schedules.keys()}
            take_over(model, config, adapter_name, {name: v for name, v in now.items() if v is not None})
        return mapped


def take_over(model: nn.Module, config: MoAConfig, adapter_name: str, options: dict[str, Any]) -> None:
    """Set options of an adapter's routers, and say so in its config."""
    for module in model.modules():
        own = isinstance(module, ExpertMixture) and module.key.adapter == adapter_name
        if own and not isinstance(module.router, FollowRouter):
            for name, value in options.items():
                module.router.set_option(name, module.router.option_at(name, [[0.0, value]], 0.0))
    for name, value in options.items():
        config.note_option(name, value)


def _in_running_order(paths: list[str]) -> list[str]:
    """Modules in the order of the model, and of one attention the query first, which some models define last."""
    first: dict[str, int] = {}
    for i, path in enumerate(paths):
        first.setdefault(path.rpartition(".")[0], i)

    def place(path: str) -> tuple[int, bool]:
        parent, _, name = path.rpartition(".")
        return first[parent], name not in QUERY

    layers: dict[str, list[str]] = {}
    for path in sorted(paths, key=place):
        layers.setdefault(_layer_of(path) or path, []).append(path)
    return [path for layer, inside in layers.items() for path in _ffn_last(layer, inside)]


def _ffn_last(layer: str, paths: list[str]) -> list[str]:
    """The modules of one layer, its FFN after the others where a model defines it before all of them (Bamba, Jamba).

    A layer that has one before and one after (Conformer) stays as it is defined.
    """
    ffn = [sublayer_of(path.removeprefix(layer), None) == "ffn" for path in paths]
    if ffn != sorted(ffn, reverse=True):
        return paths
    return [path for late in (False, True) for path, is_ffn in zip(paths, ffn, strict=True) if is_ffn == late]


def _layer_of(path: str) -> str:
    """The path of the layer that a module lies in; "" outside of the layers."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", path)
    return "" if found is None else found[0]
