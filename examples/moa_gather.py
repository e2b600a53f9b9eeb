"""Existing LoRA folders as the experts of one model, and a router that Trainer trains.

python examples/moa_gather.py BASE TEXT.txt --expert law=user/law-lora --expert code=runs/code
"""

import argparse

from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from mixadapters import GateUsageCallback, MoAConfig, StageCallback
from mixadapters.core.starting import whole

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("base")
parser.add_argument("text", help="a text file of all domains, one document a line")
parser.add_argument("--expert", action="append", required=True, help="name=folder or hub id of a LoRA")
parser.add_argument("--steps", type=whole(1), default=200)
parser.add_argument("--out", default="runs/moa")
given = parser.parse_args()
experts = dict(pair.split("=", 1) for pair in given.expert)
config = MoAConfig(experts=experts, router="top_k", router_scope="block", task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(given.base), config)
tokenizer = AutoTokenizer.from_pretrained(given.base)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = load_dataset("text", data_files=given.text, split="train")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns="text")
arguments = TrainingArguments(given.out, max_steps=given.steps, learning_rate=1e-3, logging_steps=20, report_to="none")
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, arguments, collator, rows, callbacks=[StageCallback("router")])
trainer.add_callback(GateUsageCallback(trainer))
trainer.train()
model.save_pretrained(given.out)  # stands on its own: the experts' weights are in it
