from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mixadapters.core.config import MixtureConfig
from mixadapters.core.fields import one_of
from mixadapters.core.names import check_name
from mixadapters.routers.modality import TOKEN_TYPES, Modalities
from mixadapters.tuners.pill.inputs import check_token_ids
from mixadapters.tuners.registration import peft_type

PRESETS: dict[str, dict[str, Any]] = {
    # The released code on LLaMA-2-7B, with the projector of its vision tokens (768 wide) as `projector`.
    "paper_7b": {
        "r": 32, "modalities": ["text", "image"], "attention_adapter": "shared", "gate_init": "zero",
        "last_layer_experts": True, "modules_to_save": ["projector"],
    },
}  # fmt: skip


@dataclass
class PILLConfig(MixtureConfig):
    """One expert per modality before the FFN, an adapter before attention, and a gate on the values of attention.

    With n and m the outputs of the norms that feed attention and FFN: both read n + A(n) and m + E_i(m), i the
    token's modality; the values v of tokens that are no text become g * v, one g per token and KV head.

    Which modality a token has is never guessed: it comes from the batch field `modality_ids` (B, T), from
    `mm_token_type_ids` (B, T), or from `token_ids`, in this order.
    """

    stages: ClassVar[dict[str, tuple[str, ...]]] = {
        "align": ("ffn.bank.experts.*", "!ffn.bank.experts.text.*", "modules_to_save"),
        "tune": ("*", "modules_to_save"),
    }
    needs: ClassVar[frozenset[str]] = frozenset({"modality_ids"})

    r: int = field(default=32, metadata={"help": "Width of an expert (paper: 32).", "least": 1, "free": True})
    modalities: list[str] = field(
        default_factory=lambda: ["text", "image"],
        metadata={"help": "In the order of their ids; the first is text.", "order": True},
    )
    token_ids: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Modality -> tokens that stand for it. None: as the base model's config says, if it does.",
        },
    )
    attention_adapter: Literal["shared", "per_modality", "none"] = field(
        default="shared", metadata={"help": "Before attention (paper: one for all tokens)."}
    )
    ffn_experts: list[str] | None = field(
        default=None, metadata={"help": "Modalities with an expert before the FFN. None: all (paper)."}
    )
    last_layer_experts: bool = field(
        default=False,
        metadata={
            "help": "Non-text experts in the last layer too: a loss on text alone never trains them.",
            "free": True,
        },
    )
    gate: bool = field(default=True, metadata={"help": "The gate on values."})
    gate_modalities: list[str] | None = field(
        default=None, metadata={"help": "Modalities whose values are gated. None: all but text (paper)."}
    )
    gate_shared: bool = field(default=False, metadata={"help": "One gate for these together, not one for each."})
    gate_init: Literal["zero", "one"] | None = field(
        default=None,
        metadata={"help": "g = tanh(z) (paper) or 1 + tanh(z), z = 0 at first. None: one if the base is multimodal."},
    )
    gate_granularity: Literal["kv_head", "layer"] = field(
        default="kv_head", metadata={"help": "A factor per token and KV head (paper), or per token."}
    )
    stage: Literal["align", "tune"] = field(
        default="tune",
        metadata={"help": "The stage it is in; set_stage keeps it. In 'align' the gate is 1.", "free": True},
    )
    front_ends: dict[str, dict[str, int]] | None = field(
        default=None, metadata={"help": "Modality -> how images or sounds come in; filled in, checked.", "told": True}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("PILL")
        for name in self.modalities:
            check_name("modalities", name, "pill_")
        if len(set(self.modalities)) != len(self.modalities) or self.modalities[:1] != ["text"]:
            raise ValueError(f"modalities={self.modalities} must begin with 'text' and name each modality once")
        for name, known in (
            ("ffn_experts", self.modalities), ("gate_modalities", self.modalities),
            ("token_ids", [*self.modalities, *TOKEN_TYPES]),
        ):  # fmt: skip
            given = getattr(self, name) or ()
            for modality in given:
                one_of(name, modality, known)
            if len(set(given)) != len(given):
                raise ValueError(f"{name}={given} must name each modality once")
        if self.gate_modalities == [] or "text" in (self.gate_modalities or ()):
            raise ValueError(
                f"gate_modalities={self.gate_modalities} must name modalities other than text, whose values are never "
                "gated; for no gate set gate=False"
            )
        check_token_ids(self.token_ids or {})
        if self.target_modules is not None and self.sites is None:
            raise ValueError(
                f"target_modules={self.target_modules}: PILL has adapters of several kinds; say by sites which "
                "modules are the attention_norm, the ffn_norm and the value projection"
            )

    @classmethod
    def preset(cls, name: Literal["paper_7b"], **overrides: Any) -> PILLConfig:
        """The released code's choices; `overrides` are fields of this config."""
        one_of("preset", name, PRESETS)
        return cls(**{**PRESETS[name], **overrides})

    def source(self) -> Modalities:
        """What says which modality a token has."""
        if self.token_ids is None:
            return Modalities(tuple(self.modalities))
        pairs = ((token, name) for name, tokens in self.token_ids.items() for token in tokens)
        return Modalities(tuple(self.modalities), tuple(pairs))
