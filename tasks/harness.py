"""lm-evaluation-harness with the adapter types of this package: the arguments of `lm_eval`, unchanged.

    python -m mixadapters.tasks.harness --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks hellaswag

The harness loads `peft=` by PEFT, which has learned the types once this package is imported, as it is by now.
`accelerate launch -m mixadapters.tasks.harness` works likewise.
"""

from __future__ import annotations


def main() -> None:
    """Raises SystemExit: the harness is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise SystemExit(f"lm-evaluation-harness cannot be imported ({error}): pip install 'lm-eval[hf]'") from error
    cli_evaluate()


if __name__ == "__main__":
    main()
