from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from peft import LoraConfig

from mixadapters.core.config import MixtureConfig, refuse_no_scale
from mixadapters.kernels import ACTIVATIONS
from mixadapters.tuners.bottleneck.config import BottleneckConfig
from mixadapters.tuners.registration import peft_type

# Style -> what it says of the plain adapter.
STYLES: dict[str, dict[str, Any]] = {
    "adaptformer": {"placement": "parallel", "activation": "gelu", "scale": 0.1},
    "pfeiffer": {"placement": "pfeiffer", "activation": "relu", "scale": 1.0},
    "houlsby": {"placement": "houlsby", "activation": "silu", "scale": 1.0},
}


@dataclass
class MoSAConfig(MixtureConfig):
    """One adapter whose entries are dealt to experts; each training forward uses those of one expert per matrix.

    W = W0 + D where the drawn expert owns the entry, W0 elsewhere; in evaluation W = W0 + D / num_experts. D is one
    parameter of the size of the matrix. W0 is 0 for up projections. With num_experts=1 it is the plain adapter, bit
    for bit: a BottleneckConfig, or LoRA. Fields of which None is said to follow the style hold its value afterwards.
    """

    stages: ClassVar[dict[str, tuple[str, ...]]] = {"domain": ("*",), "task": ("*", "modules_to_save")}

    base: Literal["adapter", "lora"] = field(default="adapter", metadata={"help": "What is split."})
    style: Literal["adaptformer", "pfeiffer", "houlsby"] | None = field(
        default=None, metadata={"help": "Where adapters sit. None: adaptformer. LoRA has none."}
    )
    r: int | None = field(
        default=None, metadata={"help": "Width. None: 64 for adapters, 16 for LoRA (paper).", "least": 1, "free": True}
    )
    num_experts: int = field(
        default=4,
        metadata={
            "help": "Parts of each split matrix, at most 255 (an owner is kept in a byte); 1: no split.", "least": 1,
            "most": 255,
        },
    )  # fmt: skip
    split: Literal["up", "down", "both"] = field(
        default="up", metadata={"help": "Which projection is split (paper: up)."}
    )
    granularity: Literal["element", "row", "column", "rank"] = field(
        default="element",
        metadata={"help": "What is dealt: entries (paper), rows or columns of the weight, or its r ranks."},
    )
    biases: Literal["shared", "per_expert", "none"] | None = field(
        default=None,
        metadata={"help": "Of the projections. None: shared by the experts; LoRA has none. (PEFT reads `bias`.)"},
    )
    partition_seed: int = field(default=0, metadata={"help": "Of the partition and of the draws."})
    consistency: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the symmetric KL between two draws. None: 1 (paper); 0 for num_experts=1.",
            "least": 0,
            "free": True,
        },
    )
    aux_ce: float = field(
        default=0.0,
        metadata={"help": "Weight of the cross-entropy of the second draw (paper: 0).", "least": 0, "free": True},
    )
    deep_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the mean squared distance of hidden states (paper, Cars: 0.005).",
            "least": 0,
            "free": True,
        },
    )
    deep_layers: int = field(
        default=6, metadata={"help": "Over the outputs of so many first blocks (paper: 6).", "least": 1, "free": True}
    )
    merge: Literal["mean", "sum"] = field(
        default="mean", metadata={"help": "In evaluation: W0 + D / num_experts (paper), or W0 + D."}
    )
    inactive_update: Literal["dense", "lazy"] = field(
        default="dense",
        metadata={
            "help": "Entries not drawn in a step: the optimizer's momentum and decay, or left alone (LazyAdamW).",
            "free": True,
        },
    )
    sampler: Literal["group", "batch"] = field(
        default="group",
        metadata={"help": "The two passes of the consistency loss draw apart (paper), or together.", "free": True},
    )
    sync_ranks: bool = field(default=True, metadata={"help": "All processes draw the same experts.", "free": True})
    adapter_input: Literal["residual", "ffn_input"] | None = field(
        default=None,
        metadata={
            "help": "What AdaptFormer reads: the stream before the FFN's norm, or after. None: by architecture."
        },
    )
    activation: str | None = field(
        default=None,
        metadata={"help": f"None: by style. One of {sorted(ACTIVATIONS)}.", "choices": tuple(ACTIVATIONS)},
    )
    layer_norm: bool | None = field(
        default=None,
        metadata={"help": "A LayerNorm of its own. None: for pfeiffer, and for adaptformer on the residual stream."},
    )
    scale: float | Literal["learnable"] | None = field(
        default=None, metadata={"help": "Factor on the output. None: by style; 'learnable': from 1. LoRA: alpha / r."}
    )
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the adapter's input.", "least": 0, "below": 1, "free": True}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("MOSA")
        lora = self.base == "lora"
        if lora:
            self._refuse_for_lora()
        else:
            self.style = self.style or "adaptformer"
            style = STYLES[self.style]
            self.activation = style["activation"] if self.activation is None else self.activation
        if self.adapter_input is not None and self.style != "adaptformer":
            raise ValueError(f"adapter_input={self.adapter_input!r} needs style='adaptformer', not {self.style!r}")
        self.r = (16 if lora else 64) if self.r is None else self.r
        self.biases = ("none" if lora else "shared") if self.biases is None else self.biases
        self.scale = (1.0 if lora else STYLES[str(self.style)]["scale"]) if self.scale is None else self.scale
        refuse_no_scale(self.scale)
        if self.consistency is None:
            self.consistency = 1.0 if self.num_experts > 1 else 0.0
        if self.inactive_update == "lazy" and not self.sync_ranks:
            raise ValueError("inactive_update='lazy' needs sync_ranks=True: ranks would leave different entries alone")

    def _refuse_for_lora(self) -> None:
        given = {"style": None, "activation": None, "layer_norm": None, "adapter_input": None}
        for name, nothing in given.items():
            if getattr(self, name) is not nothing:
                raise ValueError(f"{name}={getattr(self, name)!r} is for adapters; leave it out with base='lora'")
        if self.biases not in (None, "none"):
            raise ValueError(f"biases={self.biases!r}: LoRA has none; leave it out with base='lora'")
        if self.scale == "learnable":
            raise ValueError("scale='learnable' is for adapters; give a number (alpha / r) with base='lora'")

    @property
    def two_passes(self) -> bool:
        """Whether a training forward needs each row twice."""
        return bool(self.consistency or self.aux_ce or self.deep_weight)

    def placed(self) -> tuple[Any, Any]:
        """The placement and the input of the adapter that is split, for base='adapter'."""
        assert self.style is not None
        return STYLES[self.style]["placement"], self.adapter_input or "ffn_input"

    def plain(self) -> BottleneckConfig:
        """The adapter that is split, for base='adapter'. Sites and the like are this config's own."""
        shared = {f.name: getattr(self, f.name) for f in fields(MixtureConfig) if f.init and f.name != "peft_type"}
        assert self.activation is not None
        assert self.scale is not None
        placement, adapter_input = self.placed()
        layer_norm = self.layer_norm
        if layer_norm is None:
            layer_norm = self.style == "pfeiffer" or self.adapter_input == "residual"
        return BottleneckConfig(
            **shared, r=self.r, placement=placement, adapter_input=adapter_input, activation=self.activation,
            layer_norm=layer_norm, use_bias=self.biases != "none", scale=self.scale, dropout=self.dropout,
        )  # fmt: skip

    def plain_lora(self, paths: list[str], ranks: dict[str, int], **more: Any) -> LoraConfig:
        """Stock LoRA of the same weights, for base='lora'. ranks: path of a module -> its rank, where not `r`."""
        assert self.r is not None
        assert isinstance(self.scale, (int, float))
        kept = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "modules_to_save",
                "trainable_token_indices")  # fmt: skip
        return LoraConfig(
            r=self.r, lora_alpha=self.scale * self.r, lora_dropout=self.dropout, target_modules=paths,
            rank_pattern=dict(ranks), alpha_pattern={path: self.scale * rank for path, rank in ranks.items()},
            **{name: getattr(self, name) for name in kept}, **more,
        )  # fmt: skip
