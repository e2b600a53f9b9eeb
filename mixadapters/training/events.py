"""What callbacks ask when the Trainer calls them: whose event it is, and which model trains."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerState

from mixadapters.core.model import MixtureModel


def find_tuner(model: nn.Module) -> MixtureModel:
    """The tuner inside a PeftModel (or around it: DDP, torch.compile). Raises ValueError where there is none."""
    for module in model.modules():
        if isinstance(module, MixtureModel):
            return module
    raise ValueError(
        f"{type(model).__name__} holds no adapter of mixadapters; pass the result of get_peft_model(model, config)"
    )


def plain_optimizer(optimizer: Any) -> Any:
    """The optimizer of torch inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def progress(state: TrainerState) -> float:
    """The share of a run that is done: of its steps, so that a resumed run goes on where it was."""
    return min(state.global_step / max(state.max_steps, 1), 1.0)
