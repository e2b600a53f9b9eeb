"""The hooks that open and close a record around each forward of a model. Adapters do not see them.

They are permanent, since those added per call are ignored under `torch.compile`, and bound methods of objects that
hold a `ForwardContext`, so that copies and pickles of a model have a context of their own. (A `context` is that here;
its module imports this one.)
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from mixadapters import kernels
from mixadapters.core import generation
from mixadapters.core.bound_hooks import owners, unhook
from mixadapters.core.cache import claim, count_read, made_cache, settle
from mixadapters.core.fields import check_kind
from mixadapters.core.joining import countable, join_losses, refuse_idle
from mixadapters.core.processes import several
from mixadapters.core.record import Record, Records
from mixadapters.core.rows import row_names
from mixadapters.core.sites import has_two_stacks, layer_index
from mixadapters.core.streams import read_stream, refuse_packed

NUMBERS = frozenset({"domain_ids", "expert_ids", "modality_ids"})  # which expert a row takes: each of other adapters
# What collators make for objectives -> the objective, and a field without which no adapter here can mean it.
FOR_OBJECTIVES = {
    "old_input_ids": ("PreservationObjective", None),
    "old_attention_mask": ("PreservationObjective", None),
    "target": ("GuidanceDistillation", "guidance_scale"),
}
MISSPELT = 0.92  # likeness of two words: one letter or two; token_type_ids are not mm_token_type_ids


class RootHooks:
    """Opens a record before each forward of the root and closes it afterwards, also after an error."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self._layers: list[nn.Module] | None = None  # those that activation checkpointing may run again
        self._not_ours: set[tuple[str, int]] = set()  # arguments that are none of so many fields misspelt

    def open(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        context, records = self.context, self.context.records
        taken = context.own_fields.union(*(o.takes for o in context.objectives))
        known, held = context.fields | taken, records.held
        given = {name: kwargs[name] for name in kwargs if name in known}
        kwargs = {name: value for name, value in kwargs.items() if name not in taken}
        record = Record(
            module.training,
            torch.is_grad_enabled(),
            open=True,
            values={**held, **given},
            pinned=frozenset(held).difference(given),
            copies=records.thread.copies,
            parent=records.running,
        )
        records.enter(record)
        self._refuse_unread(kwargs)
        for objective in self._active(record):
            args, kwargs = objective.before(context, args, kwargs)
        kwargs = countable(kwargs, module) if record.grad else kwargs
        record.inputs = {**dict(zip(context.argument_names, args, strict=False)), **kwargs}
        requests = records.thread.requests
        stream = record.streams[""] = read_stream(record.inputs, record.copies, requests=requests)
        if stream.packed and requests is not None:
            self._refuse_fields(record.values)
            record.values["adapter_names"] = requests.adapters
        elif stream.packed:
            self.refuse_packing(module, record.values)
        names = record.values.get("adapter_names")
        if names is not None:
            names = record.values["adapter_names"] = row_names(names, context, module)
        if names is not None and not stream.packed and len(names) * stream.copies != stream.batch:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {stream.batch // stream.copies} respectively."
            )
        if not torch.compiler.is_compiling():
            if several():
                context.engine.look(module, record.training and record.grad)
            if record.training or "labels" in kwargs:  # steps of decoding are not held up
                records.trainers.look(lambda model: root_of(model) is module, context.own_fields)
        copied = _is_copy(module)
        if copied and any(host.to_prepare() for host in context.preparing):
            raise ValueError(
                "what adapters draw or compute once for each forward (MoSA, AGD) does not reach the copies that "
                "nn.DataParallel makes of a model: start one process for each device (torchrun), or hide all devices "
                "but one (CUDA_VISIBLE_DEVICES=0)"
            )
        record.plain = not copied and self.plain(record)
        self._claim_cache(record, stream.cache)
        self.carry_into_checkpoints(module, whole=not copied)
        context.prepare()
        return args, kwargs

    def plain(self, record: Record) -> bool:
        """Whether the layers of a forward that begins may go the shortest way, as `Record` has it."""
        return not (record.values or self.context.observers) and undisturbed()

    def _refuse_unread(self, kwargs: dict[str, Any]) -> None:
        """Raises ValueError for an argument that is a field of other adapters or an objective's, or nearly one of
        these: models with **kwargs swallow it."""
        if torch.compiler.is_compiling():
            return
        fields = self.context.fields
        for name in kwargs:
            if name not in self.context.argument_names and (name, len(fields)) not in self._not_ours:
                if name in NUMBERS:
                    raise ValueError(
                        f"{name} is read by no adapter of this model, so nothing would come of it. They read "
                        f"{sorted(fields)}"
                    )
                objective, field = FOR_OBJECTIVES.get(name, (None, None))
                if objective is not None and (field is None or field in fields):
                    raise ValueError(
                        f"{name} is for {objective}, which this model has not, so nothing would come of it: give "
                        f"StageCallback(..., objectives=[{objective}()]) to the Trainer, or leave it out of the batch"
                    )
                if meant := get_close_matches(name, sorted(fields), n=1, cutoff=MISSPELT):
                    raise ValueError(
                        f"{name} is no argument of the model and no field that its adapters read, so nothing would "
                        f"come of it. Did you mean {meant[0]!r}?"
                    )
                self._not_ours.add((name, len(fields)))

    def refuse_packing(self, module: nn.Module, values: dict[str, Any]) -> None:
        """Raises ValueError where requests that are packed into one row would get something else than alone."""
        self._refuse_fields(values)
        for host in module.modules():
            reason = getattr(host, "refuses_packed", None) if getattr(host, "context", None) is self.context else None
            if reason is not None:
                raise refuse_packed(reason)

    @staticmethod
    def _refuse_fields(values: dict[str, Any]) -> None:
        if said := sorted(name for name, value in values.items() if value is not None):
            raise refuse_packed(f"the fields {said}")

    def close(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        record = self.context.record
        try:
            if output is not None:  # None: the forward raised
                output = self._finish(record, module, output)
        finally:
            record.open, record.closed = False, True
            record.plain = record.plain and record.grad  # what a compiled graph computes again, it does as before
            if record.parent is not None:
                self.context.enter(record.parent)
        return output

    def _active(self, record: Record) -> list[Any]:
        if record.parent is not None:
            return []
        trains = record.training and record.grad  # not so in a reference pass
        return [o for o in self.context.objectives if trains or getattr(o, "in_eval", False)]

    def _finish(self, record: Record, module: nn.Module, output: Any) -> Any:
        for objective in self._active(record):
            output = objective.after(self.context, module, output)
        output = join_losses(record, module, output, self.context.loss_scale)
        refuse_idle(record, output)
        if record.passed:
            warn_of_passed(record)
        cache, stream = made_cache(output), record.streams[""]
        kept_in = stream.cache if cache is None else cache
        if kept_in is not None:
            settle(kept_in, record.router_state)
            count_read(kept_in, stream.past + (stream.length or 0))
        if cache is not stream.cache and cache is not None:
            self._claim_cache(record, cache)
        return output

    def _claim_cache(self, record: Record, cache: Any) -> None:
        owner = self.context.cache_owner
        if owner is not None and cache is not None and not torch.compiler.is_compiling():
            names = record.values.get("adapter_names")
            who = owner() if names is None else f"the rows' own adapters, {list(names)}"
            claim(cache, who, filled=record.streams[""].cached)

    def carry_into_checkpoints(self, module: nn.Module, whole: bool = True) -> None:
        """Wrap the checkpoint functions that transformers sets on layers, whenever it has set new ones.

        whole: whether `module` is the root, and not a copy of it or a part that runs by itself.
        """
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        layers = self._layers if whole else None
        if layers is None:
            layers = [m for m in module.modules() if hasattr(m, "gradient_checkpointing")]
        if whole:
            self._layers = layers
        for layer in layers:
            function = layer.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, Checkpointed):
                layer._gradient_checkpointing_func = Checkpointed(self.context, function)


def _is_copy(module: nn.Module) -> bool:
    """Whether nn.DataParallel has made a module, for one forward. Weights are no parameters there."""
    return getattr(module, "_is_replica", False)


def warn_of_passed(record: Record) -> None:
    """Say, once, at which layers a forward has read the weight alone: their adapters do nothing there."""
    if paths := [host.path for host in record.passed if host.newly_passed()]:
        warnings.warn(
            f"the model reads the weight of {paths[0]!r} and does not call the layer"
            f"{f' ({len(paths)} such layers)' if len(paths) > 1 else ''}, so that adapters do nothing there: make the "
            f"adapter without (exclude_modules=[{paths[0].rpartition('.')[2]!r}])",
            stacklevel=2,
        )


def undisturbed() -> bool:
    """Whether operations run as they are written: not cast or chosen by the caller."""
    return not (torch.is_autocast_enabled("cpu") or kernels.overridden())


class Rooted:
    """A context: a copy of the model has one of its own; a part that is copied, as by PEFT, goes on with this one."""

    _hooks: RootHooks

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self._hooks) not in memo:  # the root's hooks come first where the root is copied
            return self
        copied: Any = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


class StackHook:
    """Notes the sequence that a part of the model reads: in `generate` the encoder runs before any root forward."""

    def __init__(self, context: Any, stack: str, names: tuple[str, ...]) -> None:
        self.context, self.stack, self.names = context, stack, names

    def open(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        records = self.context.records
        running = records.running
        if running is not None and not self.stack:  # the root has read it
            return
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if running is None:  # alone it reads the caller's rows as they are
            record = Record.of_pinned(module.training, records.held, inputs=inputs)
            record.plain = self.context._hooks.plain(record)
            records.enter(record)
        record = records.current
        mask_name = "decoder_attention_mask" if self.stack == "decoder" else "attention_mask"
        record.streams[self.stack] = read_stream(inputs, record.copies, mask_name)
        if running is None:
            self.context.prepare()

    def close(self, module: nn.Module, args: tuple, output: Any) -> None:
        record = self.context.record
        if record.open:  # its root will do it
            return
        record.closed, record.plain = True, record.plain and record.grad  # as at the root
        cache = None if output is None else made_cache(output)  # None: the forward raised
        if cache is not None:
            stream = record.streams[self.stack]
            settle(cache, record.router_state)
            count_read(cache, stream.past + (stream.length or 0))


class PartHook:
    """Before a model inside the root: outside a forward (`get_image_features`) its layers may run again, too."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def open(self, module: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling() and self.context.running is None:
            self.context._hooks.carry_into_checkpoints(module, whole=False)


class Checkpointed:
    """A checkpoint function whose second run of a layer sees the record of the first."""

    def __init__(self, context: Any, function: Any) -> None:
        self.context, self.function = context, function

    def __call__(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler recomputes in its graph, not by running Python again
            return self.function(layer, *args, **kwargs)
        records: Records = self.context.records
        record = self.context.record_at(self, training=True)  # which checkpoint functions act in
        record.checkpointed = True
        again = False

        def run(*inner: Any, **keywords: Any) -> Any:
            nonlocal again
            if not again:
                again = True
                return layer(*inner, **keywords)
            with records.using(record):
                return layer(*inner, **keywords)

        return self.function(run, *args, **kwargs)


def root_of(model: nn.Module) -> nn.Module:
    """The model whose forwards have records, inside what PEFT, data parallelism and the compiler put around it."""
    check_kind("model", model, nn.Module, "a model")
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(type(model), "inject_adapter"):  # a tuner of PEFT
            model = model.model
        elif hasattr(type(model), "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model._modules.get("_orig_mod"), nn.Module):
            model = model._orig_mod
        else:
            return model


def attach(hooks: RootHooks, model: nn.Module) -> None:
    """Hook a context up to the root `model`."""
    context = hooks.context
    model.register_forward_pre_hook(hooks.open, with_kwargs=True, prepend=True)
    model.register_forward_hook(hooks.close, with_kwargs=True, always_call=True)
    for part in model.modules():
        if part is not model and hasattr(part, "gradient_checkpointing_enable"):
            part.register_forward_pre_hook(PartHook(context).open)
    if has_two_stacks(model):
        parts = {stack: getattr(model, f"get_{stack}")() for stack in ("encoder", "decoder")}
    else:  # reward trainers call the model without its head
        parts = {"": getattr(model, getattr(model, "base_model_prefix", None) or "", None)}
    for stack, part in parts.items():
        if isinstance(part, nn.Module):
            hook = StackHook(context, stack, names_of_arguments(part))
            part.register_forward_pre_hook(hook.open, with_kwargs=True)
            part.register_forward_hook(hook.close, always_call=True)
    generation.wrap(model, context)


def find(cls: type, model: nn.Module) -> Any:
    """The context of class `cls` that is hooked up to `model`, or None."""
    for owner in owners(model._forward_pre_hooks):
        if isinstance(owner, RootHooks) and isinstance(owner.context, cls):
            return owner.context
    return None


def detach(context: Any, model: nn.Module) -> None:
    """Take the hooks of `context` off `model` and everything in it."""
    for module in model.modules():
        for owner in [*owners(module._forward_pre_hooks), *owners(module._forward_hooks)]:
            if getattr(owner, "context", None) is context:
                unhook(module, owner)
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, Checkpointed):
            module._gradient_checkpointing_func = function.function
        generation.unwrap(module, context)


def names_of_arguments(module: nn.Module) -> tuple[str, ...]:
    """The arguments of the module's forward, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


@contextmanager
def truncated(backbone: nn.Module) -> Iterator[None]:
    """Cut each stack of layers after the last one that holds an observing adapter."""
    depth: dict[str, int] = {}
    for path, module in backbone.named_modules():
        index = layer_index(path) if getattr(module, "observes", False) else None
        if index is not None:
            stack = path[: path.index(f".{index}.")]
            depth[stack] = max(depth.get(stack, 0), index + 1)
    cut: list[tuple[nn.Module, str, nn.ModuleList]] = []
    try:
        for path, layers in depth.items():
            parent, _, name = path.rpartition(".")
            owner, full = backbone.get_submodule(parent), backbone.get_submodule(path)
            if isinstance(full, nn.ModuleList):
                cut.append((owner, name, full))
                setattr(owner, name, full[:layers])
        yield
    finally:
        for owner, name, full in cut:
            setattr(owner, name, full)
