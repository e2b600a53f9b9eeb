"""What callbacks ask when the Trainer calls them: whose event it is, which model trains, and when a run has ended."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from mixadapters.core.model import MixtureModel

WATCHED = "_mixadapters_run"  # on `Trainer.train` that has been replaced


class RunCallback(TrainerCallback):
    """A callback that sets something on the model for a run, and takes it back however the run ends.

    Trainer has no event for a run that raises (an error, Ctrl-C), after which nobody else would do it, and none before
    it has loaded the checkpoint that it goes on from.
    """

    def run_begins(self, trainer: Trainer, resumed: Path | None) -> None:
        """Look at the folder that a run goes on from, before anything of it is loaded. None: it begins anew."""

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
        ours = [callback for callback in self.callback_handler.callbacks if isinstance(callback, RunCallback)]
        resumed = _resumed(self, inspect.signature(train).bind(self, *args, **kwargs).arguments) if ours else None
        try:
            for callback in ours:
                callback.run_begins(self, resumed)
            return train(self, *args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, RunCallback):
                    callback.run_ended(self.model)

    setattr(watched, WATCHED, True)
    Trainer.train = watched


def _resumed(trainer: Trainer, given: dict[str, Any]) -> Path | None:
    """The checkpoint that `train` is told to go on from; None also where it is no folder, which Trainer refuses."""
    folder = given.get("resume_from_checkpoint")
    if folder is True:
        output = trainer.args.output_dir
        folder = get_last_checkpoint(output) if Path(output).is_dir() else None
    return Path(folder) if folder and Path(folder).is_dir() else None


def find_tuner(model: nn.Module) -> MixtureModel:
    """The tuner inside a PeftModel (or around it: DDP, torch.compile). Raises ValueError where there is none."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    for module in modules:
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
