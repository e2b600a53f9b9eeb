from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mixadapters.core.config import MixtureConfig, refuse_no_scale
from mixadapters.core.files import being_loaded
from mixadapters.kernels import ACTIVATIONS
from mixadapters.tuners.registration import peft_type

PLACEMENTS = ("pfeiffer", "houlsby", "parallel")
INPUTS = ("ffn_input", "ffn_intermediate")
GATHERED = {"placement": "parallel", "use_bias": True, "scale": 1.0}  # fields of adapters that MixDA gathers


@dataclass
class BottleneckConfig(MixtureConfig):
    """One bottleneck adapter per site: y + scale * up(act(down(norm(source)))), zero at the start.

    Placements: "pfeiffer" reads and follows the output of the FFN; "houlsby" also that of self-attention, both before
    the residual sum; "parallel" reads the FFN's input (or its intermediate) and adds to its output. With
    `target_modules` the adapter sits at exactly those modules, by the same rule.
    """

    stages: ClassVar[dict[str, tuple[str, ...]]] = {
        "domain": ("*",),
        "task": ("*", "modules_to_save"),
    }

    r: int | None = field(
        default=None,
        metadata={"help": "Bottleneck width. None: input width / reduction_factor.", "least": 1, "free": True},
    )
    reduction_factor: float = field(
        default=16, metadata={"help": "Input width / bottleneck width (MixDA: 16).", "least": 1e-3, "free": True}
    )
    placement: Literal["pfeiffer", "houlsby", "parallel"] = field(
        default="pfeiffer", metadata={"help": "Where adapters sit (default: Pfeiffer et al. 2021)."}
    )
    adapter_input: Literal["ffn_input", "ffn_intermediate", "residual"] = field(
        default="ffn_input",
        metadata={
            "help": "What parallel adapters read; MixDA's domain adapters: ffn_intermediate; AdaptFormer's: residual, "
            "the stream before the FFN's norm."
        },
    )
    activation: str = field(
        default="gelu", metadata={"help": f"One of {sorted(ACTIVATIONS)}.", "choices": tuple(ACTIVATIONS)}
    )
    glu: bool = field(default=False, metadata={"help": "up(act(gate(x)) * down(x)) instead of up(act(down(x)))."})
    layer_norm: bool = field(default=False, metadata={"help": "A LayerNorm of its own on the adapter's input."})
    use_bias: bool = field(default=True, metadata={"help": "Biases in the adapter's projections."})
    scale: float | Literal["learnable"] = field(
        default=1.0, metadata={"help": "Factor on the adapter's output; 'learnable': one per adapter, from 1."}
    )
    dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout on the adapter's input (MixDA: none).", "least": 0, "below": 1, "free": True},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("BOTTLENECK")
        refuse_no_scale(self.scale)
        if self.adapter_input != "ffn_input" and self.placement != "parallel":
            raise ValueError(
                f"adapter_input={self.adapter_input!r} needs placement='parallel', not {self.placement!r}"
            )

    @classmethod
    def domain(cls, **overrides: Any) -> BottleneckConfig:
        """A domain's adapter that MixDA gathers: parallel, from the FFN's intermediate; `overrides` are other fields.

        `adapter_input`, `activation`, `glu` and `layer_norm` may be others, where the mixture's config says so too.

        Raises:
            ValueError: a field that no mixture could gather.
        """
        for name, value in GATHERED.items():
            if overrides.get(name, value) != value:
                raise ValueError(
                    f"{name}={overrides[name]!r}: MixDA gathers domain adapters with {name}={value!r} alone; leave it "
                    "out, or make a BottleneckConfig that is not to be gathered"
                )
        return cls(**{"adapter_input": "ffn_intermediate", **GATHERED, **overrides})

    def bank_options(self) -> dict[str, Any]:
        """Arguments of `AdapterBank` for this adapter."""
        return {
            "activation": self.activation,
            "glu": self.glu,
            "bias": self.use_bias,
            "layer_norm": self.layer_norm,
            "scale": None if self.scale == "learnable" else float(self.scale),
        }


def bottleneck_width(width: int, reduction_factor: float) -> int:
    """The width of an adapter whose input is so wide.

    Raises:
        ValueError: a factor above 1 that is no whole number, in a config that is made here: what it gives is cut.
    """
    if reduction_factor > 1 and reduction_factor % 1 and being_loaded() is None:
        raise ValueError(
            f"reduction_factor={reduction_factor} must be a whole number, or below 1 for a bottleneck that is wider "
            f"than its input of {width}; or give the width itself (r)"
        )
    return max(1, int(width // reduction_factor))


def placement_roles(placement: str, adapter_input: str, known: Collection[str]) -> tuple[str, ...]:
    """Roles of the modules that an adapter so placed sits at, among the roles that the architecture has.

    The end of the FFN is its last layer; in MoE blocks, which have none, the block.
    """
    end = "ffn_output" if "ffn_output" in known else "ffn"
    if placement == "parallel":
        # A whole FFN takes an adapter that reads its input; where there is no such module, its last layer and a tap.
        return ("ffn",) if adapter_input != "ffn_intermediate" and "ffn" in known else ("ffn_output",)
    if placement == "houlsby":
        cross = ("cross_attention_output",) if "cross_attention_output" in known else ()
        return ("attention_output", *cross, end)
    return (end,)


def placement_taps(placement: str, adapter_input: str, known: Collection[str]) -> tuple[str, ...]:
    """Roles of the modules whose input an adapter so placed reads, where its site's own input will not do."""
    if adapter_input == "residual":
        return ("ffn_norm",)
    needs = placement == "parallel" and adapter_input == "ffn_input" and "ffn" not in known
    return ("ffn_input",) if needs else ()
