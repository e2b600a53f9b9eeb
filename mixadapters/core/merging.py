"""Merging: the adapters of a layer are folded into its frozen weight, and taken out of it again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mixadapters.core.files import not_finite
from mixadapters.core.record import Record
from mixadapters.core.sites import is_pointwise
from mixadapters.core.walking import plain_path


class Merging(BaseTunerLayer):
    """What a layer with `adapters` at the module `path` does when they are merged."""

    path: str
    _before_merge: tuple[Tensor, Tensor | None] | None = None  # the frozen weight and bias, while adapters are merged

    def to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """The adapters here that a merge of these names, or of the active ones, would fold in, in order.

        Raises:
            ValueError: the active adapters act in another order.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.adapters]
        active = [n for n in self.active_adapters if n in self.adapters and n not in self.merged_adapters]
        inside = [n for n in names if n in active]
        if inside != active[: len(inside)]:
            raise ValueError(
                f"cannot merge {names} at {self.path!r}: the active adapters act one after the other, {active}; merge "
                "them in this order, from the first"
            )
        return names

    def folded(self, adapter_names: list[str], safe: bool = False) -> tuple[Tensor, Tensor | None]:
        """Weight, in the frozen layer's own shape, and bias (M,) with the named adapters folded in.

        Raises:
            ValueError: an adapter equals no linear layer, or with `safe` is not finite; the message says which, where
                and why.
        """
        base = self.get_base_layer()
        turned = isinstance(base, Conv1D)  # its weight is (K, M)
        if not (turned or hasattr(base, "in_features") or is_pointwise(base)):
            raise ValueError(f"cannot merge at {self.path!r}: {type(base).__name__} is not a linear layer")
        own, own_bias = self.get_base_weight(), getattr(base, "bias", None)
        weight = own.T if turned else own.flatten(1)
        bias = None if own_bias is None else own_bias.data
        for name in adapter_names:
            try:
                weight, new_bias = self.adapters[name].fold(weight, bias)
            except ValueError as reason:
                raise ValueError(f"adapter {name!r} at {self.path!r} cannot be merged: {reason}") from None
            if bias is None and new_bias is not None:
                raise ValueError(
                    f"adapter {name!r} at {self.path!r} cannot be merged: it has a bias and the layer has none; train "
                    "with use_bias=False"
                )
            bias = new_bias
        if safe and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            broken = adapter_names[-1]
            raise ValueError(f"NaNs detected in the merged weights. The adapter {broken} seems to be broken")
        return (weight.T if turned else weight.reshape(own.shape)), bias

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the frozen weight. Raises ValueError, before any change, where that is not exact."""
        names = self.to_merge(adapter_names)
        if not names:
            return
        weight, bias = self.folded(names, safe_merge)
        if self._before_merge is None:
            base = self.get_base_layer()
            own, own_bias = self.get_base_weight(), getattr(base, "bias", None)
            kept = base.weight if self._is_torchao else own.clone()
            self._before_merge = (kept, None if own_bias is None else own_bias.data.clone())
        self._set_weight(weight)
        self._set_bias(bias)
        self.merged_adapters += names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the frozen weight: bit for bit, except where bitsandbytes or HQQ quantizes it anew."""
        if self._before_merge is not None:
            weight, bias = self._before_merge
            if self._is_torchao:
                self.get_base_layer().weight = weight
            else:
                self._set_weight(weight)
            self._set_bias(bias)
            self._before_merge = None
        self.merged_adapters.clear()

    @property
    def _is_torchao(self) -> bool:
        return getattr(self.quantization_backend, "backend_name", None) == "torchao"

    def _set_weight(self, weight: Tensor) -> None:
        self.set_base_weight(weight.to(self.get_base_weight().dtype).contiguous())

    def _set_bias(self, bias: Tensor | None) -> None:
        if bias is not None:
            own = self.get_base_layer().bias
            own.data = bias.to(own.dtype)

    def refuse_choices(self, record: Record) -> None:
        """Raise ValueError where the batch chooses adapters, or experts of one, and a merged one acts on all rows."""
        if record.values.get("adapter_names") is not None:
            raise ValueError(  # as PEFT says it
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        for name in self.merged_adapters:
            for part in self.adapters[name].modules() if name in self.adapters else ():
                field = getattr(getattr(part, "hard_routes", None), "field", None)
                if field is not None and record.values.get(field) is not None:
                    raise ValueError(
                        f"{field} chooses experts of adapter {name!r}, which is merged, so that no row has a choice: "
                        "unmerge it, or leave the field out"
                    )


def refuse_merge(model: nn.Module, hosts: Iterable[Any], adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Ask every layer of a model with adapters, `hosts`, before the first is changed.

    Raises:
        ValueError: a merge is not exact, its weights are not finite, or it would change other modules too.
    """
    owners: dict[tuple[bool, int], list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta and parameter.numel():
            owners.setdefault(_memory_of(parameter), []).append(plain_path(key))
    for host in hosts:
        names = host.to_merge(adapter_names)
        if not names:
            continue
        for name in names:
            _refuse_broken(host, name)
        host.folded(names, safe_merge)
        for parameter in host.get_base_layer().parameters(recurse=False):
            others = {n.rpartition(".")[0] for n in owners.get(_memory_of(parameter), ())} - {host.path}
            if others:
                raise ValueError(
                    f"cannot merge at {host.path!r}: its weight is also that of {sorted(others)}, which would "
                    "change too. Untie them first (tie_word_embeddings=False, and a copy of the weight)"
                )


def _memory_of(parameter: nn.Parameter) -> tuple[bool, int]:
    """The same for parameters that share their memory. Quantized ones have no address of their own: the object."""
    address = parameter.data_ptr()
    return bool(address), address or id(parameter)


def _refuse_broken(host: Any, adapter_name: str) -> None:
    """Raise ValueError, as PEFT does where `safe_merge`, for weights by which an unloaded model would lose its own."""
    weights = {key: p.detach() for key, p in host.adapters[adapter_name].named_parameters() if not p.is_meta}
    if broken := not_finite(weights):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: {broken[0]!r} at "
            f"{host.path!r} holds NaN or infinite values"
        )
