"""Stage 1 of domain adapters: unlabelled text of a domain, general English beside it, and the training on both."""

from __future__ import annotations

import random
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, Trainer, TrainingArguments

from mixadapters.core.context import Objective
from mixadapters.tasks.sources import read_texts
from mixadapters.training.callbacks import StageCallback
from mixadapters.training.collators import PairCollator, WithGeneralText
from mixadapters.training.objectives import ContrastiveObjective, PreservationObjective
from mixadapters.tuners.bottleneck.config import BottleneckConfig
from mixadapters.tuners.moa.config import MoAConfig

# Computer science has no unlabelled file of its own: the training texts of its two tasks serve, without their labels.
UNLABELLED = {
    "biomed": "unlabelled/biomed_sentences",
    "reviews": "unlabelled/imdb_unsup unlabelled/amazon_reviews",
    "papers": "dapt/csabstruct/train dapt/citation_intent_aclarc/train",
}
GENERAL = {"glue/mnli/train": "premise", "glue/qnli/train": "sentence"}  # ten genres of English; Wikipedia
HELD_OUT = 200  # general texts that stage 1 does not see
SIZE = 40_000  # sentences of a domain at most
COUNTED = 10_000  # sentences of a kind of text that a gate counts
RANK = 32  # of a domain's LoRA


def key(text: str) -> str:
    """`text` without letter case, digits and punctuation."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def unique(texts: Iterable[str]) -> list[str]:
    """The texts with different keys, the first of each."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(key(text), text)
    return list(first.values())


def split_text(text: str) -> Iterator[str]:
    """Split a text into its sentences, and those of over 60 words into parts; drop what has under 5 words."""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        w = sentence.split()
        yield from (" ".join(w[i : i + 60]) for i in range(0, len(w), 60) if len(w) - i >= 5)


def domains_for(domain: str) -> tuple[str, str]:
    """The domain of a task and one that is foreign to it."""
    if domain not in UNLABELLED:
        raise ValueError(f"domain {domain!r} has no unlabelled text; have {', '.join(UNLABELLED)}")
    return domain, "reviews" if domain == "biomed" else "biomed"


def unlabelled(folder: Path, domain: str, unseen: Collection[str], rng: random.Random) -> tuple[list[str], int]:
    """At most SIZE sentences of a domain in the order of their documents, and the number of documents.

    Args:
        unseen: keys of sentences to leave out, those of dev and test.
    """
    found = [text for (text,) in read_texts(folder, UNLABELLED[domain], "text")]
    cut = [s for s in unique(s for text in found for s in split_text(text)) if key(s) not in unseen]
    chosen = sorted(rng.sample(range(len(cut)), min(len(cut), SIZE)))
    return [cut[i] for i in chosen], len(found)  # neighbours stay neighbours


def general(folder: Path, rng: random.Random) -> list[str]:
    """Sentences of general English, in random order; the last HELD_OUT are for measuring."""
    found = [text for name, field in GENERAL.items() for (text,) in read_texts(folder, name, field)]
    texts = unique(sentence for text in found for sentence in split_text(text))
    rng.shuffle(texts)
    return texts


def halves(text: str) -> dict[str, str]:
    words = text.split()
    middle = len(words) // 2
    return {"text": " ".join(words[:middle]), "positive": " ".join(words[middle:])}


def new_domain(method: str, name: str, layers: list[int], task_type: str | None) -> PeftConfig:
    """The untrained adapter of a domain: a bottleneck for MixDA, a LoRA under MoA (which takes objectives) for MoA."""
    if method == "moa":
        return MoAConfig(
            experts=[name], router="single", r=RANK, lora_alpha=2 * RANK, layers_to_transform=layers,
            task_type=task_type,
        )  # fmt: skip
    return BottleneckConfig(
        placement="parallel", adapter_input="ffn_intermediate", layers_to_transform=layers, task_type=task_type
    )


def save_whole(model: PeftModel, folder: Path) -> None:
    """Save a domain's adapter aside and rename its folder: whole or not at all. What a killed process left there goes.

    A LoRA is written as PEFT's.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as aside:
        config, path = model.peft_config["default"], Path(aside) / folder.name
        if isinstance(config, MoAConfig):
            model.base_model.export_expert(config.all_names()[0], path)
        else:
            model.save_pretrained(str(path))
        if folder.is_dir() and not (folder / "adapter_config.json").is_file():
            shutil.rmtree(folder)
        try:
            (Path(aside) / folder.name).rename(folder)
        except OSError:
            if not (folder / "adapter_config.json").is_file():  # or another process was faster, with the same
                raise


def train_domain(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    general: Sequence[str],
    arguments: TrainingArguments,
    max_length: int,
    generates: bool = False,
) -> None:
    """Train the domain adapter in `model` on a domain's texts, and hold it to leave general text as it is.

    The knowledge loss is contrastive between the halves of a text (dropout alone is no task for a trained encoder), or
    of the next token where the model `generates`.

    Raises ValueError: the texts do not fill one batch.
    """
    objectives: list[Objective] = [PreservationObjective()]
    stage = "experts" if isinstance(model.peft_config["default"], MoAConfig) else "domain"
    rows: list[dict[str, Any]]
    if generates:
        rows = [{"input_ids": tokenizer(t, truncation=True, max_length=max_length)["input_ids"]} for t in texts]
        collator: Any = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    else:
        rows = [halves(text) for text in texts if len(text.split()) >= 10]
        collator = PairCollator(tokenizer, max_length=max_length)
        objectives.insert(0, ContrastiveObjective())
    batch = arguments.train_batch_size * arguments.world_size
    if len(rows) < batch:
        raise ValueError(
            f"stage 1 has {len(rows)} texts, which fill no batch of {batch}: nothing would train; pass a smaller "
            "--stage1_batch, or more text"
        )
    Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=WithGeneralText(
            collator, general, tokenizer, max_length=max_length,
            batch_size=arguments.per_device_train_batch_size, seed=0,
        ),
        callbacks=[StageCallback(stage, objectives=objectives)],
    ).train()  # fmt: skip
