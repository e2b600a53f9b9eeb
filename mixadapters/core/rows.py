"""Rows of a batch that name their own adapters: the names, and PEFT's saved modules in such a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from mixadapters.core.bound_hooks import owners
from mixadapters.core.media import media_part
from mixadapters.core.processes import several
from mixadapters.core.walking import plain_path

BASE = "__base__"  # the name that PEFT gives to rows without an adapter
# Modules of which PEFT makes a mixed batch: a row of their output depends on the same row of their input alone.
MIXABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class RowNames(list[str]):
    """The adapters that the rows of one call of a model name, with what its layers have made of them."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(names)
        self.batches: dict[nn.Module, Any] = {}  # layer -> its MixedBatch
        self.owners: dict[object, Tensor] = {}

    @classmethod
    def read(cls, value: Any) -> RowNames:
        """From any sequence of names, one for each row.

        Raises:
            ValueError: `value` is one name, or holds something else than names.
        """
        if isinstance(value, (str, bytes)):
            raise ValueError(f"adapter_names={value!r} is one name; give one for each row of the batch, in a list")
        names = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(names, Sequence):
            raise ValueError(f"adapter_names={value!r} must be a list of names, one for each row of the batch")
        for row, name in enumerate(names):
            if not isinstance(name, str):
                raise ValueError(
                    f"adapter_names[{row}]={name!r} is no name of an adapter; {BASE!r} stands for rows without one"
                )
        return cls([str(name) for name in names])


def row_names(value: Any, context: Any, model: nn.Module) -> RowNames:
    """The names of a call's rows, known to be adapters of the root `model`.

    Raises:
        ValueError: see `RowNames.read`; no layer of the model has an adapter of that name, or an adapter of another
            library's type acts here whose layers know no rows.
    """
    if isinstance(value, RowNames):
        return value
    names = RowNames.read(value)
    unknown = set(names) - context.hosted - {BASE}
    for path, module in _of_peft(model):
        if isinstance(module, AuxiliaryTrainingWrapper):
            unknown -= module._get_available_adapters()
            SavedModule.attach(module, path, context, model)
        elif not module.disable_adapters:
            unknown -= set(module._all_available_adapter_names())
            OtherLayer.attach(module, path, context, model)
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}{_chosen_by(unknown, model)}"
        )
    return names


def _chosen_by(unknown: set[str], model: nn.Module) -> str:
    """How to choose what is no adapter, but an expert of one, such as a domain; "" where none of the names is."""
    for module in model.modules():
        routes: Any = getattr(module, "hard_routes", None)
        if routes is not None and (mine := sorted(unknown.intersection(module.bank.names))):
            return (
                f". {mine[0]!r} is an expert of adapter {module.key.adapter!r}: name that, and choose its experts by "
                f"{routes.field}, one number for each row"
            )
    return ""


def saved_modules(model: nn.Module) -> Iterator[tuple[str, AuxiliaryTrainingWrapper]]:
    """Modules that PEFT has copied for adapters, with their paths."""
    return ((path, module) for path, module in _of_peft(model) if isinstance(module, AuxiliaryTrainingWrapper))


def _of_peft(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's own modules in `model`, with their paths: saved modules, and layers of its types, around ours or inside.

    Not looked for inside adapters, of which there may be many.
    """
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield path, module
            continue
        if isinstance(module, BaseTunerLayer) and not hasattr(module, "apply_adapters"):  # not one of ours
            yield path, module
        adapters = getattr(module, "adapter_layer_names", ())
        for name, child in module._modules.items():
            if child is not None and name not in adapters:
                waiting.append((f"{path}.{name}" if path else name, child))


class _RowHook:
    """A hook on a module of PEFT's, which reads there what adapter each row names; one for each context."""

    def __init__(self, path: str, context: Any, model: nn.Module) -> None:
        self.path, self.context = path, context
        self.stack = media_part(plain_path(path), model)

    @classmethod
    def sits_on(cls, hooks: Mapping[int, Any], context: Any) -> bool:
        """Whether one of this class and context is among the hooks of a module."""
        return any(isinstance(owner, cls) and owner.context is context for owner in owners(hooks))


class OtherLayer(_RowHook):
    """Tells a layer of PEFT's LoRA the adapter of each row, as PEFT tells it in a model of LoRA alone."""

    @classmethod
    def attach(cls, layer: Any, path: str, context: Any, model: nn.Module) -> None:
        """Hook one up to `layer`, once.

        Raises:
            ValueError: adapters act there that cannot be told.
        """
        if cls.sits_on(layer._forward_pre_hooks, context):
            return
        if not hasattr(layer, "_mixed_batch_forward"):
            names = sorted(layer._all_available_adapter_names())
            raise ValueError(
                f"adapter_names does not reach {type(layer).__name__} at {path!r}, with the adapters {names}: that "
                "type knows no rows. Delete them, or run rows in batches of their own, by set_adapter"
            )
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{path!r} has adapters of another type, which a compiled model cannot prepare for adapter_names: "
                "call the model with adapter_names once before it is compiled"
            )
        layer.register_forward_pre_hook(cls(path, context, model).tell, with_kwargs=True)

    def tell(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        names = self.context.records.names
        if names is None or "adapter_names" in kwargs:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
        self.context.record_at(self, x, layer.training)
        stream = self.context.stream(self.stack)
        rows = stream.spread([numbers[name] for name in names], x.shape[0], "adapter_names")
        order = list(numbers)
        return args, {**kwargs, "adapter_names": [order[number] for number in rows.tolist()]}


class SavedModule(_RowHook):
    """Rows of a mixed batch through a module that adapters have copies of (`modules_to_save`, tokens to train).

    A row uses the copy of the adapter that it names, or the base's module where that has none, as after `set_adapter`.
    """

    @classmethod
    def attach(cls, wrapper: AuxiliaryTrainingWrapper, path: str, context: Any, model: nn.Module) -> None:
        """Hook one up to `wrapper`, once."""
        if cls.sits_on(wrapper._forward_hooks, context):
            return
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{path!r} is a module of several adapters, which a compiled model cannot prepare for adapter_names: "
                "call the model with adapter_names once before it is compiled"
            )
        wrapper.register_forward_hook(cls(path, context, model).mix, with_kwargs=True)

    def mix(self, module: AuxiliaryTrainingWrapper, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        names = self.context.records.names
        if names is None or module.disable_adapters:
            return output
        have = module._get_available_adapters()
        wanted = [name if name in have else BASE for name in names]
        kinds = set(wanted)
        joining = self._joining(module, kinds)
        if kinds == {_used(module)} and not joining:
            return output
        if args:
            x, args = args[0], args[1:]
        else:
            first = next(iter(kwargs))
            x, kwargs = kwargs[first], {name: value for name, value in kwargs.items() if name != first}
        if len(kinds) == 1 and not joining:
            return _run(module, kinds.pop(), x, *args, **kwargs)
        if not isinstance(module.original_module, MIXABLE):
            raise TypeError(  # as PEFT says it
                "Mixed batching is only supported for the following modules: "
                f"{', '.join(kind.__name__ for kind in MIXABLE)}. {self.path!r} cannot serve rows of several adapters "
                f"in one batch: it is a {type(module.original_module).__name__}; give rows {sorted(kinds)} in batches "
                "of their own"
            )
        place = {name: i for i, name in enumerate(dict.fromkeys([*wanted, *joining]))}
        self.context.record_at(self, x if x.is_floating_point() else x.unsqueeze(-1), module.training)
        stream = self.context.stream(self.stack)
        owner = stream.spread([place[name] for name in wanted], x.shape[0], "adapter_names")
        for name, i in place.items():
            if name != _used(module):
                rows = (owner == i).nonzero()[:, 0].to(x.device)
                output = output.index_copy(0, rows, _run(module, name, x[rows], *args, **kwargs).to(output.dtype))
        return output

    def _joining(self, module: AuxiliaryTrainingWrapper, kinds: set[str]) -> list[str]:
        """Copies that no row of this process uses, but perhaps one of another: they get gradients of zero."""
        record = self.context.record
        if not (record.training and record.grad and several() and isinstance(module.original_module, MIXABLE)):
            return []
        trains = {name for name in module._get_available_adapters() if _trains(module, name)}
        return sorted(trains - kinds)


def _trains(module: AuxiliaryTrainingWrapper, name: str) -> bool:
    return any(p.requires_grad for key, p in module.named_parameters() if f".{name}." in f".{key}.")


def _used(module: AuxiliaryTrainingWrapper) -> str | None:
    """Whose copy `module` itself runs; None where that cannot be told."""
    if isinstance(module, TrainableTokensWrapper):
        return None
    active = module.active_adapters
    return active[0] if active and all(name in module._adapters for name in active) else BASE


def _run(module: AuxiliaryTrainingWrapper, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if name == BASE:
        return module.original_module(x, *args, **kwargs)
    return module._forward_wrapped_mixed_batch(x, name, *args, **kwargs)
