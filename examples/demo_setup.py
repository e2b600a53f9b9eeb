"""What all seeds of the demo have in common: text, the base model, and how adapters are trained."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from demo_arguments import Arguments
from demo_files import Documents, parted, shuffled
from demo_models import Progress, check_base, load_base, new_base, train
from demo_text import new_tokenizer, token_rows
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from mixadapters.core.folders import MODEL_FILE, check_saved


class Setup:
    """The text of a run, its base model, and its one progress bar.

    Args:
        text: of `demo_files.read_text`.

    Raises:
        ValueError: a base that is none, or text that is too little; nothing has been written then.
    """

    def __init__(self, args: Arguments, text: tuple[list[str], str | None, Documents]) -> None:
        self.args, self.out = args, Path(args.out)
        self.domains, self.later, documents = text
        self.kinds = [*self.domains, *([self.later] if self.later else []), "general"]
        if args.domains:  # a user's lie in any order: the test is to be of all of it
            documents = {kind: shuffled(found) for kind, found in documents.items()}
        texts = {kind: parted(documents[kind]) for kind in self.kinds}
        self.tokenizer = self._tokenizer(texts)
        self.rows: dict[str, Tensor] = {}  # kind of text -> (n, T)
        self.tests: dict[str, Tensor] = {}
        for kind, (read, held_out) in texts.items():
            self.rows[kind] = self._rows(read, args.tokens, kind)
            self.tests[kind] = self._rows(held_out, args.test_tokens, f"{kind}, test")
            if (count := len(self.rows[kind])) < args.batch:
                raise ValueError(f"{kind} has {count} rows of text, fewer than a step of --batch {args.batch} reads")
        self.base_rows = None
        if args.base is None:
            self.base_rows = self._rows(texts["general"][0], args.base_tokens, "general")
        else:
            check_base(self.base(), args.base, {**self.tests, **self.rows})
        self.out.mkdir(parents=True, exist_ok=True)
        save_file(self.tests, self.out / "tests.safetensors")
        self.progress = Progress()
        if self.base_rows is not None:
            self.progress.expect(args.base_tokens)

    def _tokenizer(self, texts: dict[str, tuple[list[str], list[str]]]) -> Any:
        """The base's; or a new one, of the text that is there from the start."""
        name = self.args.base
        if name is None:
            known = (text for kind in (*self.domains, "general") for text in texts[kind][0])
            return new_tokenizer(known, self.args.vocabulary)
        check_saved("--base", name, MODEL_FILE)
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"--base {name} has no tokenizer that can be loaded: {error}") from error

    def _rows(self, documents: list[str], tokens: int, kind: str) -> Tensor:
        return token_rows(self.tokenizer, documents, self.args.length, tokens, kind)

    def sizes(self) -> str:
        """What is read of each kind of text, in a few lines."""
        asked = self.args.tokens // self.args.length
        lines = []
        for kind in self.kinds:
            whole = "" if len(self.rows[kind]) >= asked else " (all that there is)"
            lines.append(f"{kind}: trains on {self.rows[kind].numel():,} tokens{whole}, is tested on "
                         f"{self.tests[kind].numel():,} of other documents")  # fmt: skip
        return "\n".join(lines)

    def base(self) -> Any:
        """The frozen model, anew. Raises ValueError where a user's cannot be loaded."""
        gc.collect()  # those before it, which their Trainers hold in cycles
        return load_base(self.args.base or self.out / "base")

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
