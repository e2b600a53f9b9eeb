"""LoRA folders under a router that needs no training: experts weigh as much as the text so far looks like their input.

python examples/moa_arrow.py BASE "The defendant" --expert law=user/law-lora --expert code=runs/code
"""

import argparse

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixadapters import MoAConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("base")
parser.add_argument("prompt")
parser.add_argument("--expert", action="append", required=True, help="name=folder or hub id of a LoRA")
given = parser.parse_args()

experts = dict(pair.split("=", 1) for pair in given.expert)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(given.base), MoAConfig(experts=experts))
tokenizer = AutoTokenizer.from_pretrained(given.base)

prompt = tokenizer(given.prompt, return_tensors="pt")
with model.base_model.record_usage() as usage:
    output = model.eval().generate(**prompt, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
for name, value in usage.report().items():
    print(f"{name:40} {value:.3f}")
