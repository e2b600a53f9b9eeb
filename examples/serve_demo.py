"""A tiny model with three adapters, served as OpenAI's API: python examples/serve_demo.py --port 8000

Nothing is downloaded and nothing is trained, so what it says means nothing; each adapter says something else.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from mixadapters import BottleneckConfig, MoAConfig
from mixadapters.core.starting import whole
from mixadapters.serving.__main__ import main as serve

WORDS = "the a court river wind stone rate duty class method law says that shall return grow and of is in"
ADAPTERS: dict[str, PeftConfig] = {
    "law": BottleneckConfig(r=8, task_type="CAUSAL_LM"),
    "code": LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "mixture": MoAConfig(num_experts=4, r=8, target_modules=["down_proj"], task_type="CAUSAL_LM"),
}
CURL = """
curl -s http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "law", "max_tokens": 12, "messages": [{{"role": "user", "content": "the court says that"}}]}}'
"""


def prepare(folder: Path) -> None:
    """Write a random model, its tokenizer and three random adapters."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *WORDS.split()]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}assistant"
    tokenizer.save_pretrained(folder / "tiny")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "tiny")
    for name, config in ADAPTERS.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "tiny"), config)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / "adapters" / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=whole(0, 65535), default=8000)
    port = parser.parse_args().port
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # before the server has its own: the folder goes then too
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        print(CURL.format(port=port), flush=True)
        serve(["--base", f"{folder}/tiny", "--adapters", f"{folder}/adapters", "--port", str(port), "--sampling"])
