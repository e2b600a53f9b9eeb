"""What all seeds of the demo have in common: arguments, text, the base model, and how adapters are trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo_models import Progress, new_base, train
from demo_text import new_tokenizer, parted, read_text, token_rows
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Arguments:
    """What to run. The defaults are the demo."""

    base: str | None = field(default=None, metadata={"help": "Decoder: folder or hub id. None: one trained here."})
    domains: list[str] = field(default_factory=list, metadata={"help": "name=FILE of plain text, UTF-8; two or more."})
    general: str | None = field(default=None, metadata={"help": "FILE of general text. None: the installation's."})
    later: str | None = field(default=None, metadata={"help": "name=FILE of a domain that is added later."})
    out: str = field(default="runs/demo", metadata={"help": "Where everything goes."})
    seeds: int = field(default=1, metadata={"help": "Seeds of the adapters; text and base stay as they are."})
    tokens: int = field(default=40_000, metadata={"help": "Tokens of training text per domain."})
    test_tokens: int = field(default=8_000, metadata={"help": "Tokens of test text per kind, from other documents."})
    length: int = field(default=128, metadata={"help": "Tokens of a row."})
    rank: int = field(default=8, metadata={"help": "Of a domain's LoRA; the joint one has as many times more."})
    rate: float = field(default=5e-3, metadata={"help": "Learning rate of adapters; 2e-4 suits large models."})
    batch: int = field(default=4, metadata={"help": "Rows of a training step."})
    base_tokens: int = field(default=800_000, metadata={"help": "Tokens that the new base model is trained on."})
    base_rate: float = field(default=3e-3, metadata={"help": "Learning rate of the new base model."})
    vocabulary: int = field(default=3000, metadata={"help": "Tokens that the new base model knows."})
    width: int = field(default=160, metadata={"help": "Of the new base model; a multiple of 32."})
    layers: int = field(default=3, metadata={"help": "Of the new base model."})
    check: bool = field(default=False, metadata={"help": "Only reload the mixtures of --out, and print perplexities."})


class Setup:
    """The text of a run, its base model, and its one progress bar."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.out = args, Path(args.out)
        for name in ("seeds", "tokens", "test_tokens", "length", "rank", "batch"):
            if (value := getattr(args, name)) < 1:
                raise ValueError(f"--{name} {value} must be 1 or more")
        if args.domains and args.base is None:
            raise ValueError("--domains needs --base: the model that they adapt")
        self.domains, self.later, documents = read_text(args.domains, args.general, args.later)
        self.kinds = [*self.domains, *([self.later] if self.later else []), "general"]
        texts = {kind: parted(documents[kind]) for kind in self.kinds}
        if args.base is None:
            known = (text for kind in (*self.domains, "general") for text in texts[kind][0])
            self.tokenizer = new_tokenizer(known, args.vocabulary)
        else:
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(args.base)
            except (OSError, ValueError) as error:
                raise ValueError(f"--base {args.base} has no tokenizer that can be loaded: {error}") from error
        self.rows: dict[str, Tensor] = {}  # kind of text -> (n, T)
        self.tests: dict[str, Tensor] = {}
        for kind, (read, held_out) in texts.items():
            self.rows[kind] = token_rows(self.tokenizer, read, args.length, args.tokens, kind)
            self.tests[kind] = token_rows(self.tokenizer, held_out, args.length, args.test_tokens, f"{kind}, test")
        self.base_rows = None
        if args.base is None:
            self.base_rows = token_rows(self.tokenizer, texts["general"][0], args.length, args.base_tokens, "general")
        if args.base is not None:
            self.base()  # before anything is written
        self.out.mkdir(parents=True, exist_ok=True)
        save_file(self.tests, self.out / "tests.safetensors")
        self.progress = Progress()
        if self.base_rows is not None:
            self.progress.expect(args.base_tokens)

    def base(self) -> Any:
        """The frozen model, anew. Raises ValueError where a user's cannot be loaded."""
        try:
            return AutoModelForCausalLM.from_pretrained(self.args.base or self.out / "base")
        except OSError as error:
            raise ValueError(f"--base {self.args.base} cannot be loaded: {error}") from error

    def train(self, model: Any, rows: Tensor, what: str, **options: Any) -> Any:
        args = self.args
        self.progress.step(what)
        options = {"rate": args.rate, "batch": args.batch, "epochs": 1, **options}
        train(model, rows, self.progress, out=str(self.out / "trainer"), **options)
        return model

    def train_base(self) -> None:
        args = self.args
        if self.base_rows is not None:
            model = new_base(len(self.tokenizer), args.width, args.layers, args.length)
            epochs = args.base_tokens / self.base_rows.numel()
            self.train(model, self.base_rows, "a small base model", rate=args.base_rate, batch=16, epochs=epochs)
            model.save_pretrained(self.out / "base")
            self.tokenizer.save_pretrained(self.out / "base")
