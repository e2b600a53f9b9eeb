"""What a Trainer of transformers would do to the rows of a model with adapters and not say, whatever its callbacks."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import ref

import torch
from accelerate.state import GradientState
from torch.utils.data import IterableDataset

from mixadapters.core.engines import loaded

CHOOSING = frozenset({"domain_ids", "expert_ids"})  # rows without these columns take the weights of a router


def trainer_above() -> Any:
    """The Trainer that is calling, from however far; None where there is none.

    Neither events nor forwards say whose they are, and only it knows the columns of its dataset and how many
    micro-batches a step has.
    """
    kind = loaded("transformers.trainer", "Trainer")
    frame = inspect.currentframe() if kind else None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back
    return None


class TrainerLook:
    """Looks at the Trainer whose batches a model gets: once for each pass over its rows."""

    def __init__(self) -> None:
        self._loader: Any = None  # of the last forward, a weak reference

    def look(self, holds: Any, fields: set[str]) -> None:
        """Called in forwards that train or have labels.

        Args:
            holds: whether a model is the one that runs.
            fields: what its adapters read, and the base model does not.

        Raises:
            ValueError: the Trainer drops columns which adapters read, or is one of several that each train alone.
        """
        loader = GradientState().active_dataloader
        if loader is None or (self._loader is not None and self._loader() is loader):
            return
        self._loader = ref(loader)
        trainer = trainer_above()
        if trainer is not None and holds(trainer.model):
            check_launched(trainer.args)
            check_columns(trainer, fields)
            if trainer.model.training:
                warn_of_idle_routers(trainer, fields)
            warn_of_lacking(trainer, getattr(loader, "dataset", None), fields)
            active = getattr(trainer.model, "active_adapter", None)  # of a PeftModel, a name
            if isinstance(active, str):
                check_best(trainer.args, active, active)


def check_launched(args: Any) -> None:
    """Raises ValueError where a launcher has started several processes and each would train by itself, on all rows.

    args: the Trainer's.
    """
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched.isdigit() and int(launched) > 1 and args.world_size == 1:
        raise ValueError(
            f"WORLD_SIZE={launched} processes were launched, and TrainingArguments has each train by itself: on a "
            "machine without GPUs pass use_cpu=True"
        )


def check_columns(trainer: Any, fields: Iterable[str]) -> None:
    """Raises ValueError where a Trainer drops columns of its datasets that adapters read, whose fields these are.

    Of rows that come as a stream nobody knows the columns: a warning, where adapters can read which experts a row
    takes.
    """
    if not trainer.args.remove_unused_columns:
        return
    read = set(fields).difference(trainer.label_names, getattr(trainer, "_signature_columns", None) or ())
    evaluated = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    for dataset in (trainer.train_dataset, *evaluated.values()):
        names = columns(dataset)
        if dropped := sorted(read.intersection(names or ())):
            raise ValueError(
                f"remove_unused_columns=True would drop the columns {dropped} of the dataset, which adapters "
                "read; pass remove_unused_columns=False, or a dataset without them"
            )
        if names is None and (chosen := sorted(read & CHOOSING)):
            warnings.warn(
                f"remove_unused_columns=True drops the columns {chosen} of a dataset that does not say which it has, "
                "and adapters read them: pass remove_unused_columns=False if its rows have them",
                stacklevel=2,
            )


def check_best(args: Any, active: Any, trains: str) -> None:
    """Raises ValueError where a Trainer would reload nothing at its end, and not say so.

    Args:
        args: the Trainer's.
        active: the adapter that is active first.
        trains: the one that trains.
    """
    if args.load_best_model_at_end and {active, trains} != {"default"}:
        raise ValueError(
            f"load_best_model_at_end=True reloads the adapter 'default' only, and {trains!r} trains "
            f"while {active!r} is active first; name the adapter 'default', or pass "
            "load_best_model_at_end=False and load the best checkpoint yourself (state.best_model_checkpoint)"
        )


def warn_of_idle_routers(trainer: Any, fields: Iterable[str]) -> None:
    """Warn where a column chooses the experts of every row, and routers that are to train decide nothing."""
    chosen = sorted((columns(trainer.train_dataset) or set()) & CHOOSING.intersection(fields))
    mixtures = [
        m for m in trainer.model.modules() if getattr(getattr(m, "hard_routes", None), "field", None) in chosen
    ]
    idle = [m.router for m in mixtures if m.hard_routes.field not in getattr(m.router, "fields", ())]
    if chosen and any(parameter.requires_grad for router in idle for parameter in router.parameters()):
        warnings.warn(
            f"the column {chosen[0]} chooses the experts of every row, so that routers, which are to train, learn "
            "nothing: leave the column out, or train a stage without them",
            stacklevel=2,
        )


def warn_of_lacking(trainer: Any, dataset: Any, fields: Iterable[str]) -> None:
    """Warn where rows of `dataset`, which is run through now, lack what adapters read and rows of training have."""
    told, names = columns(trainer.train_dataset), columns(dataset)
    if trainer.train_dataset is None or told is None or names is None:
        return
    if lacking := sorted(told.intersection(fields) - names):
        warnings.warn(
            f"adapters read the columns {lacking}, which the train dataset has and this one lacks: its rows go by the "
            "router or the active adapter, and are not what was trained. Add the columns, if that is not meant",
            stacklevel=2,
        )


def columns(dataset: Any) -> set[str] | None:
    """The names of what a row of `dataset` holds; None where it does not say so without being run through."""
    names = getattr(dataset, "column_names", None)
    streams = isinstance(dataset, IterableDataset)  # some have a length, and a __getitem__ that refuses
    if names is None and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not streams:
        with torch.random.fork_rng():
            row = dataset[0] if len(dataset) else ()
        names = row if isinstance(row, Mapping) else ()
    if names is None:
        return None if dataset is not None else set()
    return {name for name in names if isinstance(name, str)}
