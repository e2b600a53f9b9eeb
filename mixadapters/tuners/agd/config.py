from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mixadapters.core.config import MixtureConfig
from mixadapters.core.registry import nearest
from mixadapters.tuners.registration import peft_type

CONDITIONS = ("timestep", "class", "prompt", "prompt_mask", "pooled")
VARIED = frozenset({"class", "prompt", "pooled"})  # what the second pass of guidance has otherwise


@dataclass
class AGDConfig(MixtureConfig):
    """Adapters that give classifier-free guidance in one forward pass (adapter guidance distillation).

    Each adds to the output of an attention block a residual that depends on the guidance scale w, the timestep and the
    condition, such that one pass gives u + w (c - u) of a conditional prediction c and an unconditional u.

    Kinds, with Z the block's input, e the features of (w, t, condition) and phi = (w - 1) / s:
    "film": phi * up(SiLU((down Z)(1 + gamma(e)) + beta(e))); "cross_attention": phi * attention from Z to the
    conditions; "offset": phi * a vector made of e, the same for all tokens.
    """

    stages: ClassVar[dict[str, tuple[str, ...]]] = {"distill": ("*", "modules_to_save")}
    needs: ClassVar[frozenset[str]] = frozenset({"guidance_scale"})

    kind: Literal["film", "cross_attention", "offset"] = field(
        default="film", metadata={"help": "What an adapter computes; the last two are those of Jensen and Sadat 2025."}
    )
    r: int = field(
        default=256,
        metadata={"help": "Width of the features of the conditions, and of each adapter.", "least": 1, "free": True},
    )
    gate: bool = field(
        default=True,
        metadata={"help": "The factor phi, zero at w = 1. False: as in the paper, and not the base there."},
    )
    min_scale: float = field(
        default=1.0, metadata={"help": "The least guidance scale of the training data.", "least": 0}
    )
    max_scale: float = field(default=12.0, metadata={"help": "The largest; phi is 2 there."})
    default_scale: float = field(
        default=1.0, metadata={"help": "Guidance scale of a forward that is given none; 1: the base model."}
    )
    conditions: dict[str, str] | None = field(
        default=None,
        metadata={"help": f"What adapters read, of {CONDITIONS} -> argument of the forward. None: by the model."},
    )
    num_classes: int | None = field(
        default=None, metadata={"help": "Classes, the null class included. None: by the model's config.", "least": 1}
    )
    prompt_width: int | None = field(
        default=None, metadata={"help": "Width of the prompt's tokens. None: by the model's config.", "least": 1}
    )
    pooled_width: int | None = field(
        default=None, metadata={"help": "Width of the pooled text. None: by the model's config.", "least": 1}
    )
    timestep_scale: float = field(
        default=1.0,
        metadata={
            "help": "Factor that brings timesteps to 0 ... 1000 (for models that take 0 ... 1: 1000).",
            "above": 0,
        },
    )
    negative: Literal["fixed", "distil"] = field(
        default="fixed",
        metadata={"help": 'Negative prompts: "fixed" in training, or read by the adapters ("distil").'},
    )
    after_prompt: bool | None = field(
        default=None,
        metadata={
            "help": "Language models: adapters know which tokens follow the prompt (`prompt_mask`, which `generate` "
            "knows). None: those of kind film do."
        },
    )
    base_class: str | None = field(
        default=None, metadata={"help": "Class of the base model; filled in, and checked when loading."}
    )
    teacher: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "How the training data were made: `Trajectories.info`. Kept for the record.", "free": True},
    )

    def __post_init__(self) -> None:
        from_file = type(self.__dict__["peft_type"]) is str  # as JSON has it; in Python: None, or of PEFT's enum
        super().__post_init__()
        self.peft_type = peft_type("AGD")
        for name in self.conditions or {}:
            if name not in CONDITIONS:
                raise ValueError(
                    f"conditions={self.conditions}: {name!r} is unknown; have {CONDITIONS}.{nearest(name, CONDITIONS)}"
                )
        if self.after_prompt and self.kind != "film":
            raise ValueError(f"after_prompt=True is for kind='film', not {self.kind!r}")
        if self.max_scale <= max(1, self.min_scale):
            raise ValueError(
                f"min_scale={self.min_scale}, max_scale={self.max_scale}: scales are a range that ends above 1"
            )
        trained = self.default_scale == 1 or self.min_scale <= self.default_scale <= self.max_scale
        if not trained and not from_file:  # earlier versions saved others
            raise ValueError(
                f"default_scale={self.default_scale} was not trained: it must be 1, for the base model, or between "
                f"min_scale={self.min_scale} and max_scale={self.max_scale}"
            )

    def compared(self, other: Any) -> dict[str, Any]:
        """With `after_prompt` as adapters of an earlier version have it, whose files do not tell it."""
        return {**super().compared(other), "after_prompt": bool(self.after_prompt)}
