"""Domains that come and go in one frozen language model, against one adapter for everything; measured by perplexity.

    python examples/demo.py                                         # text that an installation carries
    python examples/demo.py --base Qwen/Qwen3-0.6B --domains law=law.txt code=code.jsonl --general general.txt \
        --later tax=tax.txt --out runs/mine                         # a model and text of your own

A LoRA adapter is trained on each domain's text alone, and MoA puts them side by side under a gate of counted tokens,
which is not trained. A joint LoRA adapter of the same total size reads the same text, general text included. Then a
domain is added, and one is removed. At last the mixture gets an adapter that all text shares, and the joint one a
second reading. Writes report.json, a table, three pictures, a page of coloured text, and the adapters; a fresh process
reloads the mixtures and must find the same perplexities.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from demo_arguments import Arguments
from demo_files import read_text
from transformers import HfArgumentParser


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    try:
        (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
        text = None if args.check else read_text(args.domains, args.general, args.later)
        try:  # torch and the rest, which take seconds: after what is wrong has been said
            from demo_run import check, run
        except ModuleNotFoundError as error:
            raise ValueError(
                f"the demo needs {error.name}: run it by `make demo`, or install what it needs, pip install '.[demo]'"
            ) from error

        return check(args) if text is None else run(args, text)
    except ValueError as error:  # of arguments and files, before anything is trained
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
