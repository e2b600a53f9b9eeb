"""Go on with a prompt, and say which domains the mixture used.

python examples/generate.py Qwen/Qwen3-0.6B runs/mixture "def area(r):"
"""

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixadapters  # noqa: F401  # PEFT learns the types from it


def main(name: str, folder: str, prompt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), folder).eval()
    with model.base_model.record_usage() as usage:
        made = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=40)
    print(tokenizer.decode(made[0], skip_special_tokens=True))
    for arm, weight in usage.report().items():
        if "/weight/" in arm:
            print(f"{weight:.2f} {arm.rpartition('/')[2]}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
