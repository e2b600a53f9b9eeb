"""What callbacks ask when the Trainer calls them: whose event it is, which model trains, and when a run has ended."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState

from mixadapters.core.model import MixtureModel

WATCHED = "_mixadapters_run"  # on `Trainer.train` that has been replaced


class RunCallback(TrainerCallback):
    """A callback that sets something on the model for a run, and takes it back however the run ends.

    Trainer has no event for a run that raises (an error, Ctrl-C), after which nobody else would do it.
    """

    def run_ended(self, model: nn.Module) -> None:
        """Take back what this run has set on the model. Called once more than needed, it does nothing."""
        raise NotImplementedError


class OfAdapter:
    """Part of a callback: the adapter that it is for. Where none is given, each Trainer that is made with the callback
    finds what is active then, and keeps to it, whatever its run makes active (the reference of DPO)."""

    def is_for(self, adapter_name: str) -> None:
        self._given = self.adapter_name = adapter_name

    def find_adapter(self, tuner: MixtureModel) -> None:
        self.adapter_name = tuner.named(self._given)


def watch_runs() -> None:
    """Have `Trainer.train` tell the callbacks of this library when it ends. Callable any number of times."""
    train = Trainer.train
    if hasattr(train, WATCHED):
        return

    @functools.wraps(train)
    def watched(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        try:
            return train(self, *args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, RunCallback):
                    callback.run_ended(self.model)

    setattr(watched, WATCHED, True)
    Trainer.train = watched


def find_tuner(model: nn.Module) -> MixtureModel:
    """The tuner inside a PeftModel (or around it: DDP, torch.compile). Raises ValueError where there is none."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
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


watch_runs()
