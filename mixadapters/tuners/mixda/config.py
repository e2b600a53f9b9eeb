from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from mixadapters.core.config import MixtureConfig, one_of
from mixadapters.core.registry import nearest
from mixadapters.kernels import ACTIVATIONS
from mixadapters.routers.pooling import GRANULARITIES, POOLS
from mixadapters.tuners.bottleneck.config import INPUTS, PLACEMENTS, BottleneckConfig, check_dropout, check_rank
from mixadapters.tuners.registration import peft_type

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
        default_factory=lambda: ["domain"], metadata={"help": "New domains by name, or trained ones by source."}
    )
    r: int | None = field(default=None, metadata={"help": "Width of new domain adapters. None: by reduction_factor."})
    reduction_factor: float = field(default=16, metadata={"help": "Input width / adapter width (paper: 16)."})
    domain_layers: list[int | float] | None = field(
        default=None,
        metadata={
            "help": "Layers of new domain adapters; fractions of the depth up to 1.0. None: 1/3 and 1/2 (paper)."
        },
    )
    adapter_input: Literal["ffn_intermediate", "ffn_input"] = field(
        default="ffn_intermediate", metadata={"help": "What domain adapters read (paper: the FFN's intermediate)."}
    )
    activation: str = field(default="gelu", metadata={"help": "Of domain adapters (released code: gelu)."})
    adapter_glu: bool = field(default=False, metadata={"help": "Gated domain adapters."})
    adapter_layer_norm: bool = field(default=False, metadata={"help": "A LayerNorm on their input."})
    adapter_dropout: float = field(default=0.0, metadata={"help": "On their input (paper: none)."})
    combine: Literal["delta", "convex"] = field(default="delta", metadata={"help": "See the class."})
    gate: str = field(default="softmax", metadata={"help": "'softmax' or 'sigmoid'."})
    gate_granularity: str = field(default="token", metadata={"help": f"One of {GRANULARITIES}."})
    gate_input: Literal["ffn_intermediate", "ffn_input"] | None = field(
        default=None, metadata={"help": "What the gate reads. None: what the adapters read."}
    )
    gate_hidden: list[int] = field(
        default_factory=list, metadata={"help": "Hidden widths; [] is linear (appendix A)."}
    )
    gate_dropout: float = field(default=0.0, metadata={"help": "Before each linear layer of the gate."})
    gate_pool: str = field(default="masked_mean", metadata={"help": f"One of {POOLS}, for sequence gates."})
    gate_normalize: bool = field(default=True, metadata={"help": "Scale the gate's input to unit RMS."})
    gate_frozen_bias: float | None = field(
        default=None,
        metadata={"help": "Initial logit of the frozen layer. None: 0 for delta, weight 0.99 for convex."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the gate's logits."})
    balance_coef: float = field(default=0.0, metadata={"help": "Weight of the load-balance loss (paper: none)."})
    z_coef: float = field(default=0.0, metadata={"help": "Weight of the router z-loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the gate's entropy as a loss."})
    task_adapter: Literal["pfeiffer", "houlsby", "parallel"] | None = field(
        default="pfeiffer", metadata={"help": "Task adapter on top, in all layers (paper: pfeiffer). None: none."}
    )
    task_r: int | None = field(default=None, metadata={"help": "Its width. None: by task_reduction_factor."})
    task_reduction_factor: float = field(default=16, metadata={"help": "Hidden width / its width (paper: 16)."})
    task_activation: str = field(default="relu", metadata={"help": "Of the task adapter (released code: relu)."})
    domain_order: list[str] | None = field(
        default=None, metadata={"help": "Names in the order of the gate's arms and of `domain_ids`; filled in."}
    )
    null_arms: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Arms without expert that removed domains left, by module."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("MIXDA")
        self.domains = _check_domains(self.domains)
        if self.domain_order is not None:  # JSON files are sorted by key
            if sorted(self.domain_order) != sorted(self.domains):
                raise ValueError(f"domain_order={self.domain_order} must name the domains {sorted(self.domains)}")
            self.domains = {name: self.domains[name] for name in self.domain_order}
        self.domain_order = list(self.domains)
        one_of("adapter_input", self.adapter_input, INPUTS)
        one_of("gate_input", self.gate_input, (None, *INPUTS))
        one_of("combine", self.combine, ("delta", "convex"))
        one_of("gate", self.gate, ("softmax", "sigmoid"))
        one_of("gate_granularity", self.gate_granularity, GRANULARITIES)
        one_of("gate_pool", self.gate_pool, POOLS)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("task_activation", self.task_activation, ACTIVATIONS)
        one_of("task_adapter", self.task_adapter, (None, *PLACEMENTS))
        check_rank("r", self.r, "reduction_factor", self.reduction_factor)
        check_rank("task_r", self.task_r, "task_reduction_factor", self.task_reduction_factor)
        check_dropout("adapter_dropout", self.adapter_dropout)
        check_dropout("gate_dropout", self.gate_dropout)
        if not isinstance(self.gate_hidden, (list, tuple)) or any(width < 1 for width in self.gate_hidden):
            raise ValueError(f"gate_hidden={self.gate_hidden} must be a list of positive widths, such as [768]")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
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
        for spec in saved["domains"].values():
            if "source" in spec and "ranks" in spec:
                spec["origin"] = spec.pop("source")
        return saved

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
        return {
            "activation": self.activation,
            "glu": self.adapter_glu,
            "layer_norm": self.adapter_layer_norm,
            "scale": 1.0,
        }

    def task_config(self) -> BottleneckConfig:
        """The task adapter as a config of its own."""
        return BottleneckConfig(
            r=self.task_r, reduction_factor=self.task_reduction_factor, placement=self.task_adapter or "pfeiffer",
            activation=self.task_activation, init_weights=self.init_weights,
        )  # fmt: skip

    def frozen_bias(self, experts: int) -> float:
        """Initial logit of the frozen arm beside `experts` others: w_F = 1 - eps at logit ln(K (1 - eps) / eps)."""
        if self.gate_frozen_bias is not None:
            return self.gate_frozen_bias
        if self.combine == "delta":
            return 0.0
        return math.log(99 * max(experts, 1)) if self.gate == "softmax" else math.log(99)


def _check_domains(domains: Any) -> dict[str, dict[str, Any]]:
    """Any accepted form -> {name: {"source": ..., "revision": ..., "ranks": {module: rank}}}, empty for new ones."""
    if isinstance(domains, str):
        raise ValueError(f"domains={domains!r} must be a list of names or a dict of sources; write [{domains!r}]")
    if isinstance(domains, (list, tuple, set)):
        if len(set(domains)) != len(domains):
            raise ValueError(f"domains={list(domains)} names a domain twice")
        domains = dict.fromkeys(domains)
    known = ("source", "revision", "ranks", "check_base_model", "origin")
    checked, experts = {}, nn.ModuleDict()
    for name, spec in domains.items():
        if not isinstance(name, str) or not name or "." in name or name == "__base__" or hasattr(experts, name):
            raise ValueError(
                f"domains: {name!r} is no name for a domain: use a string without dots, other than '__base__' and the "
                "attributes of nn.ModuleDict"
            )
        spec = {"source": str(spec)} if spec is not None and not isinstance(spec, dict) else dict(spec or {})
        for key in spec:
            if key not in known:
                raise ValueError(
                    f"domains[{name!r}] has no entry {key!r}; known are {list(known)}.{nearest(key, known)}"
                )
        checked[name] = spec
    return checked
