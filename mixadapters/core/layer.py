"""Where PEFT meets an adapter: a frozen module together with the adapters named on it, wrapped or hooked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from itertools import chain
from typing import Any

import torch
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from mixadapters.core.adapter import Adapter
from mixadapters.core.bound_hooks import unhook
from mixadapters.core.context import ForwardContext
from mixadapters.core.merging import Merging
from mixadapters.core.mixed import MixedBatch
from mixadapters.core.processes import several
from mixadapters.core.record import Record
from mixadapters.core.sites import is_pointwise
from mixadapters.core.walking import outside_adapters


def refusal_of(adapter: nn.Module, known: bool) -> str | None:
    """Why an adapter cannot run where requests are packed into one row; None if it can. `known`: a server says whose
    tokens lie in the row, and keeps what routers remember of each request."""
    for part in adapter.modules():
        reason = getattr(part, "refuses_packed", None)
        if reason and not (known and getattr(part, "by_request", False)):
            return reason
    return None


class ForeignVerbs:
    """What PEFT and diffusers do to every tuner layer of a model, whoever owns it, and what is meant for LoRA."""

    cast_input_dtype_enabled = True  # PEFT switches it off for a while; nothing here casts what a layer reads

    def set_scale(self: Any, adapter_name: str, scale: float) -> None:
        """Raises ValueError: the adapter is here, and is to have another scale than 1. Others are passed over."""
        if adapter_name in self.adapters and scale != 1:
            raise ValueError(
                f"scale={scale} of adapter {adapter_name!r} at {self.path!r}: it has no scale that could be set. Set "
                "those of LoRA alone, and disable this adapter to be without it"
            )

    def scale_layer(self, scale: float) -> None: ...

    def unscale_layer(self, scale: float | None = None) -> None: ...


class AdapterHost(ForeignVerbs, Merging):
    """Named adapters at one frozen module. `MixtureLayer` and `HookedLayer` say how they are attached.

    The adapters live in the attribute `<prefix>adapters`, so that keys read `<module>.<prefix>adapters.<name>.<...>`.
    """

    context: ForwardContext
    prefix: str
    closed: str | None = None  # why no other adapter may come now

    def _begin(self, base: nn.Module, context: ForwardContext, prefix: str, path: str, in_features: int,
               out_features: int, **quantization: Any) -> None:  # fmt: skip
        self.context, self.prefix, self.path = context, prefix, path
        self.in_features, self.out_features = in_features, out_features
        self.held = f"{prefix}adapters"
        self.adapter_layer_names = (self.held,)
        self.add_module(self.held, nn.ModuleDict())
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._stride: tuple[int, ...] | None = base.stride if is_pointwise(base) else None
        self.tokens_first = False  # whether the module reads (T, B, K), not (B, T, K)
        self.turned = self._stride is not None  # whether its rows or channels are not where linear layers have them
        self.stack = ""  # that it belongs to, as `Site` has it
        self.stages: dict[str, tuple[str, ...]] = {}  # adapter -> patterns of the parameters that its stage trains
        self.quantization_backend = resolve_quantization_backend(base, **quantization)

    def lies(self, stack: str, tokens_first: bool) -> None:
        """Where the module is: in which stack, as `Site` has it, and whether it reads (T, B, K), not (B, T, K)."""
        self.stack, self.tokens_first = stack, tokens_first
        self.turned = tokens_first or self._stride is not None

    @property
    def adapters(self) -> nn.ModuleDict:
        return self._modules[self.held]

    @property
    def observes(self) -> bool:
        """Whether a trainable adapter here has something to tell on the base model's stream."""
        acting = (adapter for name, adapter in self.adapters.items() if name in self.active_adapters)
        return any(adapter.observes and any(p.requires_grad for p in adapter.parameters()) for adapter in acting)

    @property
    def refuses_packed(self) -> str | None:
        """Why an adapter that acts here cannot run where requests are packed into one row; None if all can."""
        acting = [] if self.disable_adapters else self.active_adapters
        return next((reason for name in acting if (reason := self.packed_refusal(name, known=False))), None)

    def packed_refusal(self, name: str, known: bool = True) -> str | None:
        """Why the adapter of this name cannot run in a packed row; None if it can (see `refusal_of`)."""
        return refusal_of(self.adapters[name], known) if name in self.adapters else None

    def by_request(self, name: str) -> bool:
        """Whether the adapter of this name keeps something of earlier tokens of a request (`RequestMemory`)."""
        parts = self.adapters[name].modules() if name in self.adapters else ()
        return any(getattr(part, "by_request", False) for part in parts)

    def add(self, name: str, adapter: Adapter, *, inference_mode: bool = False) -> None:
        self.adapters[name] = adapter
        self.context.hosted.add(name)
        if not adapter.lone:
            self.context.deciding.add(name)
        if adapter.prepares and self not in self.context.preparing:
            self.context.preparing.append(self)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_requires_grad(name, name in self.active_adapters and not inference_mode)

    # --- what trains: PEFT's verbs make an adapter trainable as a whole ----------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._keep_stages()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._keep_stages()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.stages.pop(adapter_name, None)

    def _keep_stages(self) -> None:
        """Freeze what the stages of the adapters do not train."""
        for name, patterns in self.stages.items():
            if name in self.adapters:
                for key, parameter in self.adapters[name].named_parameters():
                    if not in_stage(key, patterns):
                        parameter.requires_grad_(False)

    def to_prepare(self) -> list[Adapter]:
        """Those of the adapters that act here in this forward that do something before it."""
        named = self.context.record.values.get("adapter_names")
        acting = self.active_adapters if named is None else dict.fromkeys([*named, *self._joining(named)])
        found = [self.adapters[name] for name in acting if name in self.adapters and not self.disable_adapters]
        return [adapter for adapter in found if adapter.prepares]

    def acting(self, record: Record) -> list[str] | None:
        """The adapters that act here, in order; None where adapters are disabled.

        Where activation checkpointing runs this layer again, those of its first run, whatever has been switched since.

        Raises:
            RuntimeError: one of those has been removed, merged or unmerged since.
        """
        adapters, merged = self._modules[self.held]._modules, self.merged_adapters
        names = [name for name in self._active_adapter if name in adapters and name not in merged]
        now = None if self._disable_adapters else names
        if not record.grad or torch.compiler.is_compiling():  # the compiler runs nothing again
            return now
        if not self.context.records.again:
            record.acting[self] = (now, list(merged))
            return now
        then, merged_then = record.acting.get(self, (now, merged))
        if merged != merged_then or any(name not in self.adapters for name in then or ()):
            raise RuntimeError(
                f"activation checkpointing runs {self.path!r} again, but its adapters have been removed, merged or "
                f"unmerged since the forward, in which {then or 'none'} acted: do that after the backward"
            )
        return then

    def apply_adapters(self, x: Tensor, y: Tensor, names: list[str], record: Record) -> Tensor:
        """x: input of the frozen module; y: (..., M) its output. Returns the output with the adapters `names`.

        Convolutions of kernel 1 have their channels second, (B, K, ...) and (B, M, ...), and some models tokens first.
        """
        x, y, back = _rows_first(x, y, self._stride, self.tokens_first)
        return back(self._run_adapters(x, y, names, record))

    def _run_adapters(self, x: Tensor, y: Tensor, names: list[str], record: Record) -> Tensor:
        if record.observed is not None:
            for name in names:
                if self.adapters[name].observes:
                    deltas = self.adapters[name].observe(x, y, self.context)
                    if record.open:  # where checkpointing runs the layer again, the first run's are in use
                        record.observed += deltas
            return y
        if self.merged and record.values:
            self.refuse_choices(record)
        if record.values.get("adapter_names") is not None:
            return self._mixed()(x, y, self.context)
        for name in names:
            y = self.adapters[name](x, y, self.context)
        return y

    def _mixed(self) -> MixedBatch:
        """The rows of this batch by the adapters they name; kept for all steps of a `generate`."""
        named = self.context.record.values["adapter_names"]
        joining = self._joining(named)
        kept = {} if joining or torch.compiler.is_compiling() else getattr(named, "batches", {})
        if self not in kept:
            # Processes meet in one order; else the op may read weights as they are packed, where each row has its own.
            asked = dict.fromkeys([*named, *joining])
            order = self.adapters if several() else asked
            mine = [name for name in order if name in asked and name in self.adapters]
            place = {name: i for i, name in enumerate(mine)}
            owner = [place.get(name, -1) for name in named]
            kept[self] = MixedBatch([self.adapters[name] for name in mine], owner, self.stack)
        return kept[self]

    def _joining(self, named: Sequence[str]) -> list[str]:
        """Adapters that no row of this process names, but perhaps one of another: their weights are read, and get
        gradients of zero, so that all processes meet in the same calls."""
        record = self.context.record
        if not (record.training and record.grad and several()):
            return []
        others = ((name, adapter) for name, adapter in self.adapters.items() if name not in named)
        return [name for name, adapter in others if any(p.requires_grad for p in adapter.parameters())]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        found = super()._get_base_layer_device_and_dtype(base_layer)
        return found if found[0] is not None else _of_block(base_layer, found)


class MixtureLayer(nn.Module, AdapterHost):
    """A frozen module of the base model, wrapped together with its adapters."""

    _said_passed = False  # whether it has been said that the model goes past this layer

    def __init__(
        self, base_layer: nn.Module, context: ForwardContext, prefix: str, path: str, in_features: int,
        out_features: int, **quantization: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.base_layer = base_layer
        self._begin(base_layer, context, prefix, path, in_features, out_features, **quantization)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._disable_adapters and self.merged:
            self.unmerge()
        x = _first_input(args, kwargs)
        record = self.context.record_at(self, x)
        if record.passed:
            record.passed.pop(self, None)
        # The compiler derives for itself what it sees; but a part of a compiled model may run outside its graphs.
        in_steps = record.grad and not torch.compiler.is_compiling()
        if in_steps or self.turned or not record.plain:
            names = self.acting(record)
            output = self._modules["base_layer"](*args, **kwargs)
            return output if names is None else _adapted(self, x, output, names, record)
        output = self._modules["base_layer"](*args, **kwargs)
        if self._disable_adapters:
            return output
        # In decoding a call costs as much as the products: what `acting` and `apply_adapters` have to tell apart is
        # none of it here.
        y = output[0] if isinstance(output, tuple) else output
        adapters, merged = self._modules[self.held]._modules, self.merged_adapters
        for name in self._active_adapter:
            adapter = adapters.get(name)
            if adapter is not None and name not in merged:
                alone = adapter.alone(x, y) if adapter.lone else None
                y = adapter(x, y, self.context) if alone is None else alone
        return (y, *output[1:]) if isinstance(output, tuple) else y

    @property
    def weight(self) -> Tensor:
        """The frozen weight. A model that reads it, and does not call the layer, goes past the adapters around it."""
        weight, record = super().weight, self.context.record
        if record.open and not torch.compiler.is_compiling():
            record.passed[self] = None
        return weight

    def newly_passed(self) -> bool:
        """Whether adapters were to act in a forward that has read the weight alone; True once."""
        acting = not self.disable_adapters and any(name in self.adapters for name in self.active_adapters)
        if not acting or self.merged or self._said_passed:
            return False
        self._said_passed = True
        return True

    def __getattr__(self, name: str) -> Any:
        # The base model reads attributes of a wrapped block (layer_idx, attention_type ...).
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_hf_"):
                raise
            return getattr(self.base_layer, name)


class HookedLayer(nn.Module, AdapterHost):
    """Adapters on a module that keeps its place and its keys: a permanent forward hook on it.

    For composite modules whose children other libraries address by name. Verbs of those libraries that are meant for
    adapters of other names pass over this layer.
    """

    attribute = "mixadapters"  # name of this layer among the children of its target

    def __init__(
        self, target: nn.Module, context: ForwardContext, prefix: str, path: str, in_features: int, out_features: int,
        **quantization: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.__dict__["target"] = target  # not a child: it is the parent
        self._begin(target, context, prefix, path, in_features, out_features, **quantization)
        target.add_module(self.attribute, self)
        target.register_forward_hook(self.after, with_kwargs=True)

    def get_base_layer(self) -> nn.Module:
        return self.__dict__["target"]

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        x = _first_input(args, kwargs)
        record = self.context.record_at(self, x)
        names = self.acting(record)
        return output if names is None else _adapted(self, x, output, names, record)

    def forward(self, x: Tensor) -> Tensor:
        # A container that runs its children in turn comes by here.
        return x

    def remove(self) -> None:
        """Leave the target as it was."""
        target = self.get_base_layer()
        unhook(target, self)
        delattr(target, self.attribute)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        # On a block it can only be diffusers fusing its own adapters: PEFT's verbs have been refused before.
        if hasattr(self.get_base_layer(), "in_features"):
            super().merge(safe_merge, adapter_names)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if names and not self.context.hosted.intersection(names):
            return
        super().set_adapter(names, inference_mode=inference_mode)


def _of_block(block: nn.Module, usual: tuple[Any, Any]) -> tuple[Any, Any]:
    """Device and dtype of a block, which has no weight of its own: of the first inside it; `usual`: there is none."""
    inside = [module for _, module in outside_adapters(block)]
    weights = (p for module in inside for p in module.parameters(recurse=False))
    buffers = (b for module in inside for b in module.buffers(recurse=False))
    real = (t for t in chain(weights, buffers) if t.is_floating_point() and t.device.type != "meta")
    return next(((t.device, t.dtype) for t in real), usual)


def in_stage(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a parameter of an adapter is one that a stage trains; "!" begins patterns of those left out."""
    wanted = any(fnmatch(name, pattern) for pattern in patterns)
    return wanted and not any(fnmatch(name, pattern[1:]) for pattern in patterns if pattern[0] == "!")


def _rows_first(
    x: Tensor, y: Tensor, stride: tuple[int, ...] | None, tokens_first: bool
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Input and output of a layer as (B, ..., K) and (B, ..., M), and the way back for an output.

    stride: of a convolution, whose channels come second; None: they come last.
    """
    if tokens_first and x.dim() > 2:
        return x.transpose(0, 1), y.transpose(0, 1), lambda out: out.transpose(0, 1)
    if stride is None:
        return x, y, lambda out: out
    places: Any = (..., *(slice(None, None, step) for step in stride))
    return x[places].movedim(1, -1), y.movedim(1, -1), lambda out: out.movedim(-1, 1)


def _first_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))


def _adapted(host: AdapterHost, x: Tensor, output: Any, names: list[str], record: Record) -> Any:
    """The output of a module with its adapters applied; to the first of a tuple (attention weights ... follow it)."""
    y = output[0] if isinstance(output, tuple) else output
    with _trained_as_before(host, names, record) if record.checkpointed else NOTHING:
        y = host.apply_adapters(x, y, names, record)
    return (y, *output[1:]) if isinstance(output, tuple) else y


NOTHING = nullcontext()


@contextmanager
def _trained_as_before(host: AdapterHost, names: list[str], record: Record) -> Iterator[None]:
    """Under activation checkpointing: when a layer runs again, parameters train that trained in its first run.

    What a run saves for the backward depends on that, and PEFT's verbs freeze what they switch off.
    """
    if not host.context.records.again:
        named = record.values.get("adapter_names")
        acting = (host.adapters[name] for name in dict.fromkeys(named or names) if name in host.adapters)
        record.trained[host] = [(p, p.requires_grad) for adapter in acting for p in adapter.parameters()]
    changed = [(p, trained) for p, trained in record.trained.get(host, ()) if p.requires_grad != trained]
    try:
        for parameter, trained in changed:
            parameter.requires_grad_(trained)
        yield
    finally:
        for parameter, trained in changed:
            parameter.requires_grad_(not trained)
