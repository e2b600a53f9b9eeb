"""Train a LoRA adapter on a file of plain text: python examples/train_adapter.py Qwen/Qwen3-0.6B law.txt runs/law"""

import sys

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)


def main(name: str, file: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with open(file, encoding="utf-8") as lines:
        texts = [line.strip() for line in lines if line.strip()]
    rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=256)["input_ids"]]
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
    Trainer(
        model,
        TrainingArguments(
            out, num_train_epochs=1, per_device_train_batch_size=4, learning_rate=2e-4, report_to="none"
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ).train()
    model.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
