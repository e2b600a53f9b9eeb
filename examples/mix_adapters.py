"""Put trained LoRA adapters side by side under a gate that counts tokens, which needs no training.

python examples/mix_adapters.py Qwen/Qwen3-0.6B runs/mixture general.txt law=runs/law=law.txt code=runs/code=code.txt
"""

import sys

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixadapters import MoAConfig


def lines(file: str) -> list[str]:
    with open(file, encoding="utf-8") as text:
        return [line for line in text if line.strip()]


def main(name: str, out: str, general: str, *domains: str) -> None:
    given = [domain.split("=") for domain in domains]
    config = MoAConfig(
        experts={domain: folder for domain, folder, _ in given},
        router="counts",
        router_scope="model",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
    texts = {domain: lines(file) for domain, _, file in given}
    read = model.base_model.fit_gate(texts, lines(general), tokenizer=AutoTokenizer.from_pretrained(name))
    print("tokens counted:", read)
    model.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) < 5 or any(pair.count("=") != 2 for pair in sys.argv[4:]):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
