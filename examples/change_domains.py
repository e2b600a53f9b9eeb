"""Add a domain to a saved mixture, by its adapter and its text; or remove one. The others stay as they are.

python examples/change_domains.py Qwen/Qwen3-0.6B runs/mixture add tax runs/tax tax.txt
python examples/change_domains.py Qwen/Qwen3-0.6B runs/mixture remove law
"""

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixadapters  # noqa: F401  # PEFT learns the types from it


def main(name: str, folder: str, verb: str, domain: str, source: str = "", file: str = "") -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), folder)
    if verb == "add":
        model.base_model.add_expert(domain, source)
        with open(file, encoding="utf-8") as text:
            model.base_model.fit_gate({domain: list(text)}, tokenizer=AutoTokenizer.from_pretrained(name))
    else:
        model.base_model.remove_expert(domain)
    model.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != {"add": 7, "remove": 5}.get("".join(sys.argv[3:4])):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
