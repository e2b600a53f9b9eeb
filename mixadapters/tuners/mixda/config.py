from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mixadapters.core.config import MixtureConfig
from mixadapters.core.fields import one_of
from mixadapters.kernels import ACTIVATIONS
from mixadapters.routers.base import COEFFICIENTS, registered_by
from mixadapters.routers.pooling import GRANULARITIES, POOLS
from mixadapters.tuners.bottleneck.config import BottleneckConfig
from mixadapters.tuners.mixda.fields import refuse_fields_of_others
from mixadapters.tuners.mixda.router import OPTION_OF, competes, read_router, router_spec
from mixadapters.tuners.registration import peft_type
from mixadapters.tuners.sources import Entries, entries_in_words, expert_options, sources_to_origins

PRESETS: dict[str, dict[str, Any]] = {
    # Section 3.3 and appendix A: sigmoid gate on the attention output, one linear layer.
    "paper": {
        "combine": "convex", "gate": "sigmoid", "gate_input": "ffn_input", "gate_granularity": "token",
        "gate_normalize": False, "gate_frozen_bias": 0.0, "reduction_factor": 16, "task_adapter": "pfeiffer",
    },
    # The released code, for cross-checks: it reads the last position, padding or not.
    "released": {
        "combine": "convex", "gate": "softmax", "gate_granularity": "sequence", "gate_pool": "last",
        "gate_hidden": [768, 768, 768], "gate_dropout": 0.2, "gate_normalize": False, "gate_frozen_bias": 0.0,
        "reduction_factor": 16, "task_adapter": "pfeiffer", "task_activation": "relu",
    },
}  # fmt: skip


@dataclass
class MixDAConfig(MixtureConfig):
    """Domain adapters beside (part of) the FFN, weighed by a gate, and a task adapter on top.

    With F the frozen output and A_k the adapters: "delta" gives F + sum w_k A_k, the base model at the start for any
    gate; "convex" gives w_F F + sum w_k A_k, the paper's form, in which an adapter stands for the whole output.

    `domains` names them: a list makes new ones; a dict gathers trained ones from folders or hub ids (BOTTLENECK or
    MIXDA adapters), each with its own rank and layers: {"biomed": "path"}, or {"biomed": {"source": "user/name",
    "revision": "main"}}. A saved config holds their ranks by module, so the folder needs no source again.
    """

    stages: ClassVar[dict[str, tuple[str, ...]]] = {
        "domain": ("domain.bank.*",),
        "task": ("domain.router.*", "task.*", "modules_to_save"),
    }

    domains: Any = field(
        default_factory=lambda: ["domain"],
        metadata={"help": "New domains by name, or trained ones by source.", "free": True},
    )
    domain_type: Literal["bottleneck", "lora"] = field(
        default="bottleneck",
        metadata={"help": "Domain adapters beside the FFN (paper), or LoRA at any linear layers, of attention too."},
    )
    r: int | None = field(
        default=None,
        metadata={
            "help": "Width of new domain adapters. None: by reduction_factor; 8 for LoRA.",
            "least": 1,
            "free": True,
        },
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Of new domains of type LoRA, whose factor is lora_alpha / rank. None: the rank.",
            "above": 0,
            "free": True,
        },
    )
    reduction_factor: float = field(
        default=16, metadata={"help": "Input width / adapter width (paper: 16).", "least": 1e-3, "free": True}
    )
    domain_layers: list[int | float] | None = field(
        default=None,
        metadata={
            "help": "Layers of new domain adapters; fractions of the depth up to 1.0. None: 1/3 and 1/2 (paper).",
            "least": 0,
            "free": True,
        },
    )
    adapter_input: Literal["ffn_intermediate", "ffn_input"] = field(
        default="ffn_intermediate", metadata={"help": "What domain adapters read (paper: the FFN's intermediate)."}
    )
    activation: str = field(
        default="gelu",
        metadata={"help": "Of domain adapters (released code: gelu).", "choices": tuple(ACTIVATIONS)},
    )
    adapter_glu: bool = field(default=False, metadata={"help": "Gated domain adapters."})
    adapter_layer_norm: bool = field(default=False, metadata={"help": "A LayerNorm on their input."})
    adapter_dropout: float = field(
        default=0.0, metadata={"help": "On their input (paper: none).", "least": 0, "below": 1, "free": True}
    )
    combine: Literal["delta", "convex"] = field(default="delta", metadata={"help": "See the class."})
    router: str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "A router by name, or {'kind': name, option: value}. None: softmax, and the fields below.",
            "free_keys": ("dropout", "jitter", "noise", "expert_dropout", *COEFFICIENTS),  # only for training
        },
    )
    gate: str | None = field(default=None, metadata={"help": "Short for router['kind']. None: 'softmax'."})
    gate_granularity: str | None = field(
        default=None, metadata={"help": f"One of {GRANULARITIES}. None: 'token'.", "choices": GRANULARITIES}
    )
    gate_input: Literal["ffn_intermediate", "ffn_input"] | None = field(
        default=None, metadata={"help": "What the router reads (router['input']). None: what the adapters read."}
    )
    gate_hidden: list[int] | None = field(
        default=None, metadata={"help": "Hidden widths. None: [], which is linear (appendix A).", "least": 1}
    )
    gate_dropout: float | None = field(
        default=None, metadata={"help": "Before each linear layer. None: 0.", "least": 0, "below": 1, "free": True}
    )
    gate_pool: str | None = field(
        default=None,
        metadata={"help": f"One of {POOLS}, for sequences. None: 'masked_mean'.", "choices": POOLS},
    )
    gate_normalize: bool | None = field(
        default=None, metadata={"help": "Scale the router's input to unit RMS. None: yes."}
    )
    gate_frozen_bias: float | None = field(
        default=None,
        metadata={
            "help": "Initial logit of the frozen layer. None: 0 for delta, weight 0.99 for convex.",
            "free": True,
        },
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Divides the router's logits. None: 1.", "above": 0}
    )
    balance_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of the load-balance loss. None: 0 (paper: none).", "least": 0, "free": True},
    )
    z_coef: float | None = field(
        default=None, metadata={"help": "Weight of the router z-loss. None: 0.", "least": 0, "free": True}
    )
    entropy_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the weights' entropy as a loss; below 0: of its negative. None: 0.",
            "free": True,
        },
    )
    task_adapter: Literal["pfeiffer", "houlsby", "parallel", "lora"] | None = field(
        default="pfeiffer", metadata={"help": "Task adapter on top, in all layers (paper: pfeiffer). None: none."}
    )
    task_r: int | None = field(
        default=None,
        metadata={"help": "Its width. None: by task_reduction_factor; 8 for LoRA.", "least": 1, "free": True},
    )
    task_lora_alpha: float | None = field(
        default=None, metadata={"help": "Of a LoRA: its factor is task_lora_alpha / rank. None: the rank.", "above": 0}
    )
    task_target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Suffixes, or one regular expression, of the modules of a LoRA task adapter. None: query and "
            "value (paper).",
            "pattern": True,
            "free": True,
        },
    )
    task_reduction_factor: float = field(
        default=16, metadata={"help": "Hidden width / its width (paper: 16).", "least": 1e-3, "free": True}
    )
    task_activation: str = field(
        default="relu",
        metadata={"help": "Of the task adapter (released code: relu).", "choices": tuple(ACTIVATIONS)},
    )
    domain_order: list[str] | None = field(
        default=None,
        metadata={"help": "Names in the order of the gate's arms and of `domain_ids`; filled in.", "order": True},
    )
    null_arms: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Arms without expert that removed domains left, by module.", "least": 0},
    )

    def __post_init__(self) -> None:
        from_file = type(self.__dict__["peft_type"]) is str  # as JSON has it; in Python: None, or of PEFT's enum
        super().__post_init__()
        self.peft_type = peft_type("MIXDA")
        DOMAINS.look_for_folders(self.domains, from_file)
        self.domains = DOMAINS.check(self.domains, from_file)
        if self.domain_order is not None:  # JSON files are sorted by key
            if sorted(self.domain_order) != sorted(self.domains):
                raise ValueError(f"domain_order={self.domain_order} must name the domains {sorted(self.domains)}")
            self.domains = {name: self.domains[name] for name in self.domain_order}
        self.domain_order = list(self.domains)
        read_router(self)
        refuse_fields_of_others(self)
        if self.gate_input == "ffn_intermediate" and self.adapter_input == "ffn_input":
            raise ValueError(
                "gate_input='ffn_intermediate' with adapter_input='ffn_input' is not possible: the gate would need "
                "what the FFN has not computed yet; leave gate_input=None"
            )
        for layer in self.domain_layers or []:
            if isinstance(layer, float) and not 0 < layer <= 1:
                raise ValueError(f"domain_layers={self.domain_layers}: the fraction {layer} must be in (0, 1]")

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's; in files a source that has been gathered is its domain's `origin`: loading reads it no more."""
        saved = super().to_dict()
        sources_to_origins(saved["domains"])
        return saved

    def registered_by(self) -> dict[str, str]:
        return registered_by(self.router)

    def in_words(self) -> dict[str, list[str]]:
        """The domains with their origins, and the router with its options, which the older fields repeat."""
        spec = router_spec(self)
        said = [f"{name}={value!r}" for name, value in spec.items() if name != "kind"]
        router = [spec["kind"], *([] if self.gate_input is None else [f"input={self.gate_input!r}"]), *said]
        return {"domains": entries_in_words(self.domains), "router": router} | {name: [] for name in OPTION_OF}

    @classmethod
    def preset(cls, name: Literal["paper", "released"], **overrides: Any) -> MixDAConfig:
        """The paper's or the released code's choices; `overrides` are fields of this config."""
        one_of("preset", name, PRESETS)
        return cls(**{**PRESETS[name], **overrides})

    def layers(self, depth: int) -> list[int]:
        """Indices of the layers that take new domain adapters, of `depth` layers. Raises ValueError out of range."""
        wanted = [1 / 3, 1 / 2] if self.domain_layers is None else self.domain_layers
        chosen = {max(math.ceil(depth * w) - 1, 0) if isinstance(w, float) else w for w in wanted}
        if outside := sorted(i for i in chosen if not 0 <= i < depth):
            raise ValueError(
                f"domain_layers={self.domain_layers}: the model has layers 0 to {depth - 1}, not {outside}"
            )
        return sorted(chosen)

    def bank_options(self) -> dict[str, Any]:
        """Arguments of `AdapterBank` for the domain adapters."""
        if self.domain_type == "lora":
            return {"activation": "identity", "bias": False}
        return {
            "activation": self.activation,
            "glu": self.adapter_glu,
            "layer_norm": self.adapter_layer_norm,
            "scale": 1.0,
        }

    def expert_options(self, name: str, path: str) -> dict[str, Any]:
        """Arguments of `AdapterBank.add` for the domain `name` at a module."""
        return expert_options(self.domains[name], path)

    def task_config(self) -> BottleneckConfig:
        """The task adapter as a config of its own, where it is a bottleneck."""
        placement = "pfeiffer" if self.task_adapter is None or self.task_adapter == "lora" else self.task_adapter
        return BottleneckConfig(
            r=self.task_r, reduction_factor=self.task_reduction_factor, placement=placement,
            activation=self.task_activation, init_weights=self.init_weights,
        )  # fmt: skip

    def frozen_bias(self, experts: int) -> float:
        """Initial logit of the frozen arm beside `experts` others: w_F = 1 - eps at logit ln(K (1 - eps) / eps)."""
        if self.gate_frozen_bias is not None:
            return self.gate_frozen_bias
        if self.combine == "delta":
            return 0.0
        return math.log(99 * max(experts, 1)) if competes(self) else math.log(99)


DOMAINS = Entries(
    "domains", "a domain", "mixda_", r"frozen|null\d+",
    {"source": str, "revision": str, "ranks": dict[str, int], "check_base_model": bool, "origin": str, "scale": float,
     "ignore_modules_to_save": bool, "scales": dict[str, float], "biases": list[str]},
    ("source", "revision", "check_base_model", "scale", "ignore_modules_to_save"),
)  # fmt: skip
