"""Eight new LoRA experts under a top-2 router for each attention and each FFN, trained together as MixLoRA does.

python examples/moa_new_experts.py BASE TEXT.txt
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

from mixadapters import MoAConfig, StageCallback
from mixadapters.core.starting import whole

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("base")
parser.add_argument("text", help="a text file, one document a line")
parser.add_argument("--steps", type=whole(1), default=200)
parser.add_argument("--out", default="runs/moa-new", help="a new folder")
given = parser.parse_args()
config = MoAConfig(
    num_experts=8, r=8, lora_alpha=16, target_modules="all-linear", router="top_k", num_experts_per_tok=2,
    router_scope="block", router_aux_loss_coef=0.01, task_type="CAUSAL_LM",
)  # fmt: skip
model = get_peft_model(AutoModelForCausalLM.from_pretrained(given.base), config)
tokenizer = AutoTokenizer.from_pretrained(given.base)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = load_dataset("text", data_files=given.text, split="train")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns="text")
arguments = TrainingArguments(given.out, max_steps=given.steps, learning_rate=2e-4, logging_steps=20, report_to="none")
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
Trainer(model, arguments, collator, rows, callbacks=[StageCallback("all")]).train()
model.save_pretrained(given.out)
model.base_model.export_expert("expert0", f"{given.out}/expert0")  # a stock LoRA folder again
