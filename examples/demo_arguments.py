"""What the demo is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

OWN_RATE, USERS_RATE = 5e-3, 2e-4


@dataclass
class Arguments:
    """What to run. The defaults are the demo."""

    base: str | None = field(default=None, metadata={"help": "Decoder: folder or hub id. None: one trained here."})
    domains: list[str] = field(
        default_factory=list,
        metadata={"help": "name=FILE, two or more. Documents are parted by blank lines, or where those are few by "
                          "lines; of a .jsonl they are the field 'text' of its lines."},
    )  # fmt: skip
    general: str | None = field(default=None, metadata={"help": "FILE of general text. None: the installation's."})
    later: str | None = field(default=None, metadata={"help": "name=FILE of a domain that is added later."})
    out: str = field(default="runs/demo", metadata={"help": "Where everything goes."})
    seeds: int = field(default=1, metadata={"help": "Seeds of the adapters; text and base stay as they are."})
    tokens: int = field(
        default=40_000,
        metadata={"help": "Tokens of training text per domain, and of general text. No document gives over a tenth. "
                          "The time of a run goes with it."},
    )  # fmt: skip
    test_tokens: int = field(default=8_000, metadata={"help": "Tokens of test text per kind, from other documents."})
    length: int = field(default=128, metadata={"help": "Tokens of a row."})
    rank: int = field(default=8, metadata={"help": "Of a domain's LoRA; the joint one has as many times more."})
    rate: float | None = field(
        default=None,
        metadata={"help": f"Learning rate of adapters. None: {OWN_RATE:g}; {USERS_RATE:g} on a base of yours."},
    )
    batch: int = field(default=4, metadata={"help": "Rows of a training step."})
    base_tokens: int = field(default=800_000, metadata={"help": "Tokens that the new base model is trained on."})
    base_rate: float = field(default=3e-3, metadata={"help": "Learning rate of the new base model."})
    vocabulary: int = field(default=3000, metadata={"help": "Tokens that the new base model knows."})
    width: int = field(default=160, metadata={"help": "Of the new base model; a multiple of 32."})
    layers: int = field(default=3, metadata={"help": "Of the new base model."})
    check: bool = field(default=False, metadata={"help": "Only reload the mixtures of --out, and print perplexities."})

    def __post_init__(self) -> None:
        """Raises ValueError: a number out of range, text without a model, or an `out` that is a file."""
        for name in ("seeds", "tokens", "test_tokens", "rank", "batch", "base_tokens", "vocabulary", "layers"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name} {value} must be 1 or more")
        if self.length < 2:
            raise ValueError(f"--length {self.length} must be 2 or more: a token is foretold from those before it")
        if self.rate is None:
            self.rate = OWN_RATE if self.base is None else USERS_RATE
        for name in ("rate", "base_rate"):
            if not 0 < (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name} {value} must lie between 0 and 1")
        if self.width < 32 or self.width % 32:
            raise ValueError(f"--width {self.width} must be a multiple of 32")
        if self.domains and self.base is None:
            raise ValueError("--domains needs --base: the model that they adapt")
        if Path(self.out).exists() and not Path(self.out).is_dir():
            raise ValueError(f"--out {self.out} is a file: name a folder")
