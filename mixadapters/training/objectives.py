"""Losses of stage 1, run inside the root model's forward, so a plain Trainer (and DDP) trains them.

Attach one with `ForwardContext.of(model).objectives.append(objective)`, or give it to `StageCallback`. Every loss here
is the mean over its own batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, log, nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.context import ForwardContext, Objective
from mixadapters.core.evaluation import in_evaluation
from mixadapters.core.fields import check_number, one_of
from mixadapters.core.processes import gathered


class ContrastiveObjective(Objective):
    """The main loss for sentence encoders: a text is to be nearer to its partner than to the batch's other texts.

    InfoNCE over cosine similarities, from anchors to positives and back, averaged (SimCSE, arXiv 2104.08821, for the
    pairs made by dropout). It takes the batches of `PairCollator` and replaces `outputs.loss`, in evaluation too; a
    forward without `labels` in evaluation mode, such as encoding texts, is left alone. Where a model has no dropout,
    a text paired with itself gives two equal views; give positives then. Trainer evaluates a model without a head only
    where TrainingArguments(label_names=["labels"]) says that there are labels.

    Args:
        temperature: divides the similarities.
        pooling: "mean" of the valid tokens, or the "first" valid one.

    Raises (in the forward):
        ValueError: no labels in training, no attention mask, an output without `last_hidden_state`, rows that are not
            whole pairs, or a single pair.
    """

    takes: tuple[str, ...] = ("labels",)
    in_eval = True

    def __init__(self, temperature: float = 0.05, pooling: str = "mean") -> None:
        check_number("temperature", temperature, above=0)
        one_of("pooling", pooling, ("mean", "first"))
        self.temperature, self.pooling = temperature, pooling

    def after(self, context: ForwardContext, module: nn.Module, output: Any) -> Any:
        pairs = context.record.values.get("labels")
        if pairs is None:
            if module.training:
                raise ValueError("labels=None: ContrastiveObjective needs the batches of PairCollator")
            return output
        hidden, mask = getattr(output, "last_hidden_state", None), context.record.attention_mask
        if hidden is None:
            raise ValueError(
                f"{type(output).__name__} has no last_hidden_state, which ContrastiveObjective pools; load the base "
                "with AutoModel, without a head"
            )
        if mask is None:
            raise ValueError("attention_mask=None: ContrastiveObjective would pool padding; pass attention_mask")
        anchor, positive = partners(pairs)
        pooled = F.normalize(pool(hidden, mask, self.pooling), dim=-1)  # (2B, d)
        context.set_loss(info_nce(pooled[anchor], pooled[positive], self.temperature))
        return output


class MaskedObjectObjective(Objective):
    """The masked-object loss as the mean over a text's masked tokens, then over the batch's texts.

    The base model's own loss weighs texts by the length of their object instead. Takes `labels` (B, T), so the model
    does not compute its own loss as well; a forward without labels in evaluation mode is left alone.
    """

    takes: tuple[str, ...] = ("labels",)
    in_eval = True

    def after(self, context: ForwardContext, module: nn.Module, output: Any) -> Any:
        labels, logits = context.record.values.get("labels"), getattr(output, "logits", None)
        if labels is None:
            if module.training:
                raise ValueError("labels=None: MaskedObjectObjective needs the batches of ObjectMaskingCollator")
            return output
        if logits is None or logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"{type(output).__name__} has no logits of the labels' shape {tuple(labels.shape)} and a vocabulary; "
                "load the base with AutoModelForMaskedLM"
            )
        context.set_loss(mean_per_text(logits, labels))
        return output


class PreservationObjective(Objective):
    """The old-domain loss L_S: on general text, an adapter is to leave its frozen layer's output as it is.

    L_S = 1/L * sum over the L adapters of the mean, over valid tokens and the width, of delta^2, where delta is the
    adapted minus the frozen output on the base's own stream, so no adapter sees what another one did to it. The total
    is knowledge_weight * main loss + weight * L_S (MixDA, arXiv 2306.05406, section 3.2; its normalisation is not
    stated there, the mean over valid tokens and width is ours). Only in training.

    Args:
        weight: of L_S.
        knowledge_weight: lambda, of the main loss; 0.5 in the paper.

    Raises (in the forward):
        ValueError: a training batch without `old_input_ids` and `old_attention_mask`, or no adapter to observe.
    """

    takes: tuple[str, ...] = ("old_input_ids", "old_attention_mask")
    in_eval = False

    def __init__(self, weight: float = 1.0, knowledge_weight: float = 0.5) -> None:
        check_number("weight", weight, least=0)
        check_number("knowledge_weight", knowledge_weight, least=0)
        self.weight, self.knowledge_weight = weight, knowledge_weight

    def after(self, context: ForwardContext, module: nn.Module, output: Any) -> Any:
        values = context.record.values
        missing = [name for name in self.takes if values.get(name) is None]
        if missing:
            raise ValueError(
                f"the training batch has no {' and no '.join(missing)}, which PreservationObjective needs; wrap the "
                "data collator in WithGeneralText and pass remove_unused_columns=False to TrainingArguments"
            )
        mask = values["old_attention_mask"]
        deltas = context.observe(module, input_ids=values["old_input_ids"], attention_mask=mask)
        context.scale_loss(self.knowledge_weight)
        context.add_loss("preservation", preservation_loss(deltas, mask), self.weight)
        return output


def partners(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the anchors and of their positives, (B,) each, from the rows' pair numbers (2B,), in any order."""
    if pairs.ndim != 1 or len(pairs) % 2:
        raise ValueError(f"labels of shape {tuple(pairs.shape)} do not number pairs; PairCollator gives (2B,)")
    if len(pairs) < 4:
        raise ValueError(
            "one pair in the batch has no other text to be told from; raise the batch size, and pass "
            "dataloader_drop_last=True to TrainingArguments"
        )
    rows = pairs.argsort(stable=True).view(-1, 2)  # (B, 2)
    numbers = pairs[rows]
    # Under torch.compile the check is left out: it would wait for the device and break the graph.
    if not torch.compiler.is_compiling() and not (
        (numbers[:, 0] == numbers[:, 1]).all() and (numbers[1:, 0] != numbers[:-1, 0]).all()
    ):
        raise ValueError(
            f"labels={pairs.tolist()} do not name every pair exactly twice; a batch of PairCollator was cut or mixed"
        )
    return rows[:, 0], rows[:, 1]


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector per text in fp32, (B, d), from hidden (B, T, d) and mask (B, T): the valid tokens' mean or first."""
    if mask.shape != hidden.shape[:2]:
        raise ValueError(f"attention_mask of shape {tuple(mask.shape)} does not fit tokens {tuple(hidden.shape[:2])}")
    mask = mask.to(hidden.device)
    if pooling == "first":
        first = mask.ne(0).int().argmax(1)  # not 0 where padding is on the left
        return hidden[torch.arange(len(hidden), device=hidden.device), first].float()
    valid = mask.ne(0).unsqueeze(-1)  # (B, T, 1)
    return hidden.float().masked_fill(~valid, 0).sum(1) / valid.sum(1).clamp(min=1)


def info_nce(anchor: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """InfoNCE both ways between unit vectors anchor and positive, (B, d) each."""
    scores = anchor @ positive.T / temperature  # (B, B)
    target = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def mean_per_text(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, T, V) and labels (B, T): mean over a text's labelled tokens, then over texts."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
    count = labels.ne(-100).sum(1)  # (B,)
    return (losses.sum(1) / count.clamp(min=1)).sum() / count.ne(0).sum().clamp(min=1)


def preservation_loss(deltas: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean over adapters, valid tokens and width of delta^2, in fp32, from deltas (B, T, d) and mask (B, T)."""
    if not deltas:
        raise ValueError("no adapter was observed on the general text; is an adapter active and its domain enabled?")
    valid = mask.ne(0).unsqueeze(-1)  # (B, T, 1)
    total = torch.zeros((), device=mask.device)
    for delta in deltas:
        if delta.shape[:-1] != mask.shape:
            raise ValueError(f"delta {tuple(delta.shape)} does not fit old_attention_mask {tuple(mask.shape)}")
        valid = valid.to(delta.device)  # layers may lie on several devices
        square = delta.float().square().masked_fill(~valid, 0)
        total = total + (square.sum() / (valid.sum().clamp(min=1) * delta.shape[-1])).to(total.device)
    return total / len(deltas)


@torch.no_grad()
def require_pretrained_head(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Refuses a language model whose head was never trained, by its loss on one labelled batch.

    Stage 1 freezes the head, and through a random one the adapters would learn nothing but its noise. A random head
    is near ln(V) or above it, a trained one far below.

    Args:
        model: gives `loss` and `logits` (..., V) for the batch; its training flags are left as they were.
        batch: one batch of stage 1, with `labels`.

    Returns:
        the loss, a mean over all processes, which all call this.

    Raises:
        ValueError: the loss is above 0.8 * ln(V), or there is none to judge.
    """
    device = next(model.parameters()).device
    with in_evaluation(model):
        output = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
    # All processes judge by the same number: one that ended alone would leave the others waiting for it.
    losses = gathered(nan if loss is None or logits is None else float(loss))
    loss = sum(losses) / len(losses)
    if logits is None or not isfinite(loss):
        raise ValueError(
            f"loss={loss}: {type(model).__name__} gives no finite loss on the batch with {sorted(batch)}; it needs a "
            "language modelling head and labels that are not all -100"
        )
    bound = 0.8 * log(logits.shape[-1])
    if loss > bound:
        raise ValueError(
            f"loss={loss:.2f} is above 0.8 * ln(vocabulary) = {bound:.2f}: the head looks newly initialised. "
            "Load a checkpoint that has its language modelling head, or use ContrastiveObjective, which needs none, "
            "for a sentence encoder. If the head is trained and the text strange to it: "
            "StageCallback(..., check_head=False)"
        )
    return loss
