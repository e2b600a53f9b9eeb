from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft.utils.other import get_pattern_key

from mixadapters.core.fields import default_of
from mixadapters.kernels import ACTIVATIONS
from mixadapters.routers.base import registered_by
from mixadapters.routers.counts import refuse_null_arms
from mixadapters.routers.pooling import GRANULARITIES
from mixadapters.tuners.bottleneck.config import PLACEMENTS
from mixadapters.tuners.moa.overrides import OverriddenConfig
from mixadapters.tuners.moa.router import OPTION_OF, check_scope, router_in_words, router_spec
from mixadapters.tuners.registration import peft_type
from mixadapters.tuners.sources import Entries, entries_in_words, refuse_unsaveable, same_module, sources_to_origins

EXPERTS = Entries(
    "experts", "an expert", "moa_", r"frozen|null\d+|shared\d+",
    {"source": str, "revision": str, "check_base_model": bool, "scale": float, "ignore_modules_to_save": bool,
     "ranks": dict[str, int], "scales": dict[str, float], "biases": list[str], "origin": str,
     "same_as": dict[str, str | None]},
    ("source", "revision", "check_base_model", "scale", "ignore_modules_to_save"),
)  # fmt: skip
MOST = 4096  # experts or arms: a file could ask for so many that the process dies


@dataclass
class MoAConfig(OverriddenConfig):
    """A mixture of adapters: experts of one kind at linear layers, FFNs or MoE blocks, and any router over them.

    y = base(x) + sum_k w_k E_k(x). `experts` gathers trained adapters, {"law": "user/law-lora", "code": folder},
    each with its own rank, targets and layers; a list names new ones; without it there are `num_experts` new ones. A
    saved config holds what it needs of the sources, so the folder stands on its own.

    `r`, `rank_pattern`, `lora_alpha`, `use_rslora` and `alpha_pattern` are of new experts; gathered ones keep what
    they were trained with.

    Fields of the router are named as in configs of MoE models, and stand for options of `router`.

    Without `router`, new experts go by "top_k" and gathered LoRA by "arrow". That takes all experts, and weighs them
    over the text so far ("causal_prefix"); by token where a layer is not causal (encoders, models of two stacks) or
    reads its cache again (`kv_b_proj`). `num_experts_per_tok` and `granularity` go before that where they are given.
    Where a router is named and they are not, it takes two experts, if it chooses, and its own granularity: "token",
    or of "counts" and "pregate" the text so far.
    """

    stages: ClassVar[dict[str, tuple[str, ...]]] = {
        "experts": ("bank.*",),
        "router": ("router.*", "residual.*"),
        "all": ("*",),
        "task": ("*", "modules_to_save"),
    }

    experts: Any = field(
        default=None,
        metadata={
            "help": "New experts by name, or trained ones by source. None: `num_experts` new ones.",
            "free": True,
        },
    )
    num_experts: int | dict[str, int] = field(
        default=8,
        metadata={"help": "New experts where there are none by name; by layers {'0-5': 4}.", "least": 1, "most": MOST},
    )
    expert_type: Literal["lora", "bottleneck", "glu"] = field(
        default="lora", metadata={"help": "What experts are: low-rank factors, or small FFNs, gated or not."}
    )
    r: int = field(default=8, metadata={"help": "Rank, or width, of new experts.", "least": 1, "free": True})
    lora_alpha: float = field(default=8, metadata={"help": "Of new LoRA, whose factor is lora_alpha / r.", "above": 0})
    use_rslora: bool = field(default=False, metadata={"help": "Of new LoRA: the factor is lora_alpha / sqrt(r)."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "On the experts' input, in training.", "least": 0, "below": 1, "free": True}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Module name or regular expression -> alpha, where not `lora_alpha`.", "pattern": True},
    )
    activation: str = field(
        default="gelu", metadata={"help": "Of bottleneck and glu experts.", "choices": tuple(ACTIVATIONS)}
    )
    placement: str = field(
        default="parallel",
        metadata={"help": "Of bottleneck and glu experts, as in BottleneckConfig.", "choices": PLACEMENTS},
    )
    adapter_input: Literal["ffn_input", "ffn_intermediate", "residual"] = field(
        default="ffn_input", metadata={"help": "What parallel bottleneck and glu experts read."}
    )
    router: str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "By name, or {'kind': name, option: value}. None: 'top_k'; for gathered LoRA 'arrow', as above.",
            "free_keys": ("dropout", "jitter", "noise", "balance_coef", "z_coef", "entropy_coef", "importance_coef"),
        },
    )
    num_experts_per_tok: int | Literal["auto"] | None = field(
        default="auto", metadata={"help": "Experts that a token uses. None: all. 'auto': 2, or as above.", "least": 1}
    )
    router_scope: Literal["module", "block", "model"] = field(
        default="module",
        metadata={"help": "A router for each adapted layer, for those of one attention or FFN, or one for all."},
    )
    granularity: str | None = field(
        default=None,
        metadata={"help": "Tokens routed together. None: as above.", "choices": GRANULARITIES},
    )
    norm_topk_prob: bool = field(default=False, metadata={"help": "Weights of the chosen experts sum to 1."})
    routed_scaling_factor: float = field(default=1.0, metadata={"help": "Factor on the weights.", "above": 0})
    scoring_func: Literal["softmax", "sigmoid"] = field(
        default="softmax", metadata={"help": "From logits to scores of the experts."}
    )
    router_temperature: float = field(default=1.0, metadata={"help": "Divides the logits.", "above": 0})
    router_hidden: list[int] = field(
        default_factory=list, metadata={"help": "Hidden widths of the router; [] is linear.", "least": 1}
    )
    router_jitter_noise: float = field(
        default=0.0,
        metadata={
            "help": "Factors of 1 - e to 1 + e on its input, in training.",
            "least": 0,
            "below": 1,
            "free": True,
        },
    )
    router_init_range: float = field(
        default=0.02, metadata={"help": "Deviation of its first weights.", "least": 0, "free": True}
    )
    router_aux_loss_coef: float = field(
        default=0.001, metadata={"help": "Weight of the load-balance loss.", "least": 0, "free": True}
    )
    router_z_loss_coef: float = field(
        default=0.0, metadata={"help": "Weight of the z-loss.", "least": 0, "free": True}
    )
    router_entropy_coef: float = field(
        default=0.0, metadata={"help": "Weight of the entropy; below 0: of its negative.", "free": True}
    )
    router_importance_coef: float = field(
        default=0.0, metadata={"help": "Weight of CV^2 of the experts' importance.", "least": 0, "free": True}
    )
    router_bias_update_rate: float = field(
        default=0.0, metadata={"help": "Above 0: balance by a bias for choosing, without a loss.", "least": 0}
    )
    n_shared_experts: int = field(
        default=0, metadata={"help": "Experts beside the router's, always on with weight 1.", "least": 0, "most": MOST}
    )
    num_null_experts: int = field(
        default=0, metadata={"help": "Arms of the router without an expert.", "least": 0, "most": MOST}
    )
    segments: int = field(
        default=1,
        metadata={"help": "Pieces of each expert, which are routed by themselves.", "least": 1, "most": MOST},
    )
    capacity_factor: float = field(
        default=0.0, metadata={"help": "Above 0: experts drop tokens beyond it. 0: none is dropped.", "free": True}
    )
    batch_prioritized: bool = field(default=False, metadata={"help": "Drop the tokens of lowest score.", "free": True})
    residual: bool = field(
        default=False, metadata={"help": "Base and shared experts under a learned weight of two, from 1 and 1."}
    )
    train_experts: bool | None = field(
        default=None,
        metadata={"help": "Whether experts train. None: new ones do, gathered ones do not.", "free": True},
    )
    schedules: dict[str, list[list[float]]] = field(
        default_factory=dict,
        metadata={"help": "Option of the router -> [[progress from 0 to 1, value], ...].", "free": True},
    )
    null_arms: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Arms without expert that removed ones left, by module.", "least": 0, "most": MOST},
    )
    expert_order: list[str] | None = field(
        default=None,
        metadata={"help": "Names in the order of arms and of `expert_ids`; filled in.", "order": True},
    )

    def __post_init__(self) -> None:
        from_file = type(self.__dict__["peft_type"]) is str  # as JSON has it; in Python: None, or of PEFT's enum
        super().__post_init__()
        self.peft_type = peft_type("MOA")
        self._check_kind()
        if self.experts is not None:
            EXPERTS.look_for_folders(self.experts, from_file)
            self.experts = check_experts(self.experts, from_file)
            self._order_experts()
        elif self.expert_order is not None:
            raise ValueError(f"expert_order={self.expert_order} orders `experts`, and there are none by name")
        check_layers(self.num_experts)
        if self.residual and not self.n_shared_experts:
            raise ValueError("residual=True weighs the base against shared experts; set n_shared_experts=1 or more")
        if self.router is None and not (self.gathered() and self.expert_type == "lora"):
            self.router = {"kind": "top_k"}
        elif isinstance(self.router, str):
            self.router = {"kind": self.router}
        for option, value in (self.router or {}).items():
            refuse_unsaveable(f"router: {option}", value)
        cls, options = router_spec(self)
        refuse_null_arms(cls, options)
        self.check_schedules(self.schedules)
        check_scope(self, cls)

    def _check_kind(self) -> None:
        """Refuse what the experts' kind would pass over."""
        if self.expert_type == "lora":
            wrong = [
                n for n in ("activation", "placement", "adapter_input") if getattr(self, n) != default_of(self, n)
            ]
            where = "expert_type='bottleneck' or 'glu'"
        else:
            wrong = [
                n for n in ("lora_alpha", "use_rslora", "alpha_pattern") if getattr(self, n) != default_of(self, n)
            ]
            where = "expert_type='lora'"
            if self.adapter_input != "ffn_input" and self.placement != "parallel":
                raise ValueError(f"adapter_input={self.adapter_input!r} needs placement='parallel'")
        for name in wrong:
            value = getattr(self, name)
            raise ValueError(f"{name}={value!r} means nothing for {self.expert_type!r} experts; it is for {where}")

    def _order_experts(self) -> None:
        if self.expert_order is not None:  # JSON files are sorted by key
            if sorted(self.expert_order) != sorted(self.experts):
                raise ValueError(f"expert_order={self.expert_order} must name the experts {sorted(self.experts)}")
            self.experts = {name: self.experts[name] for name in self.expert_order}
        self.expert_order = list(self.experts)
        if self.num_experts != 8:
            raise ValueError(f"num_experts={self.num_experts} and experts={list(self.experts)}: give one of the two")

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's; in files a source that has been gathered is its expert's `origin`: loading reads it no more."""
        saved = super().to_dict()
        sources_to_origins(saved["experts"] or {})
        return saved

    def registered_by(self) -> dict[str, str]:
        return registered_by(self.router)

    def in_words(self) -> dict[str, list[str]]:
        """The experts with their origins, and the router with its options, those that fields stand for among them."""
        experts = {name: {} for name in self.all_names()} if self.experts is None else self.experts
        told = {"experts": entries_in_words(experts), "router": router_in_words(self)}
        return told | {name: [] for name in (*OPTION_OF, "router_scope")}

    def trained_in(self, stage: str) -> tuple[str, ...]:
        """As the class's `stages`; experts that do not train are left out, except in the stage that is for them."""
        frozen = self.frozen_experts() if stage != "experts" else []
        return (*type(self).stages[stage], *(f"!bank.experts.{name}.*" for name in frozen))

    def frozen_experts(self) -> list[str]:
        """Names of the experts that do not train; a `*` for all."""
        if self.train_experts is not None:
            return [] if self.train_experts else ["*"]
        return [piece for name in self.gathered() for piece in self.pieces(name)]

    # --- experts ---------------------------------------------------------------------------------

    def gathered(self) -> list[str]:
        """Names of the experts that were trained before."""
        return [name for name, spec in (self.experts or {}).items() if spec.keys() & {"source", "origin"}]

    def pieces(self, name: str) -> list[str]:
        """Names of what the router chooses among of one expert: itself, or its segments."""
        return [name] if self.segments == 1 else [f"{name}_{i}" for i in range(self.segments)]

    def names_at(self, layer: int | None) -> list[str]:
        """Names of the experts that a layer may have. Raises ValueError for layers that `num_experts` leaves out."""
        if self.experts is not None:
            return list(self.experts)
        count = self.num_experts
        if isinstance(count, dict):
            index = -1 if layer is None else layer
            count = next((n for layers, n in count.items() if index in layer_range(layers)), 0)
        return [f"expert{i}" for i in range(count)]

    def all_names(self) -> list[str]:
        """Names of all experts, in the order of `expert_ids`."""
        if self.experts is not None:
            return list(self.experts)
        counts = self.num_experts.values() if isinstance(self.num_experts, dict) else [self.num_experts]
        return [f"expert{i}" for i in range(max(counts))]

    def scale_at(self, path: str, rank: int) -> float:
        """The factor of a new expert at a module."""
        if self.expert_type != "lora":
            return 1.0
        key = get_pattern_key(list(self.alpha_pattern), path)
        alpha = self.alpha_pattern.get(key, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def bank_options(self) -> dict[str, Any]:
        """Arguments of `AdapterBank` for the experts."""
        if self.expert_type == "lora":
            return {"activation": "identity", "bias": False}
        return {"activation": self.activation, "glu": self.expert_type == "glu", "bias": True}


def stands_at(config: MoAConfig, path: str) -> dict[str, str | None]:
    """{expert without weights at a module: the one whose its rows go to, None for nobody's}."""
    found: dict[str, str | None] = {}
    for name, spec in (config.experts or {}).items():
        for module, other in spec.get("same_as", {}).items():
            if same_module(module, path):
                found[name] = other
    return found


def refuse_while_standing(config: MoAConfig, name: str) -> None:
    """Raise ValueError where an expert that is to go stands for others."""
    others = [other for other, spec in (config.experts or {}).items() if name in spec.get("same_as", {}).values()]
    if others:
        raise ValueError(f"expert {name!r} stands for {others} at some modules (same_as): remove these first")


def layer_range(layers: str) -> range:
    """The layers that "3" or "0-5" means. Raises ValueError for other forms."""
    found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", layers)
    if found is None or int(found[2] or found[1]) < int(found[1]) or int(found[2] or found[1]) > MOST:
        raise ValueError(f"num_experts: {layers!r} names no layers; write '3', or '0-5' for 0 to 5")
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def check_layers(num_experts: int | dict[str, int]) -> None:
    """Refuse layers that `num_experts` gives two numbers for."""
    if not isinstance(num_experts, dict):
        return
    seen: set[int] = set()
    for layers in num_experts:
        if twice := seen.intersection(layer_range(layers)):
            raise ValueError(f"num_experts={num_experts} has two numbers for layers {sorted(twice)}")
        seen.update(layer_range(layers))


def check_experts(experts: Any, from_file: bool) -> dict[str, dict[str, Any]]:
    """Any accepted form -> {name: {"source": ..., "ranks": {module: rank}, ...}}, empty for new ones."""
    checked = EXPERTS.check(experts, from_file)
    if not checked:
        raise ValueError(f"experts={experts!r} must be a list of names or a dict of sources, with at least one")
    for name, spec in checked.items():
        if set(name) & set("*?[]!"):
            raise ValueError(f"experts: {name!r} is no name for this: stages read *, ?, [, ] and ! as patterns")
        if ("scales" in spec) != ("ranks" in spec) or spec.get("scales", {}).keys() != spec.get("ranks", {}).keys():
            raise ValueError(f"experts[{name!r}]: `ranks` and `scales` must name the same modules")
        if unknown := set(spec.get("biases", ())) - set(spec.get("ranks", ())):
            raise ValueError(f"experts[{name!r}]: biases={sorted(unknown)} name modules that `ranks` does not")
        for module, other in spec.get("same_as", {}).items():
            twice = module in spec.get("ranks", {module: 1})
            if twice or (other is not None and module not in checked.get(other, {}).get("ranks", {module: 1})):
                raise ValueError(
                    f"experts[{name!r}]: same_as={spec['same_as']!r:.200} must name, for modules at which `ranks` has "
                    "none of this expert, another that has weights there, or null"
                )
    return checked
