"""The experts of MoE base models: one view of all the types in the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixadapters.core.bank import Weights
from mixadapters.core.hooks import root_of
from mixadapters.core.sites import unwrapped
from mixadapters.core.walking import plain_path
from mixadapters.surgery.bases import BASES, Base
from mixadapters.surgery.expert_map import ExpertMap, arguments, detach_map
from mixadapters.surgery.layouts import FUSED, holds_experts, hook_saving, recount
from mixadapters.surgery.view import ExpertLayer, Watcher, check_map, check_model, check_order, context_of
from mixadapters.surgery.watching import WatchedBlock, each_expert, standing_in


def base_layers(model: nn.Module) -> list[ExpertLayer]:
    """The MoE blocks of the base model.

    Raises:
        ValueError: their type is not in the table; or they are quantized, sharded or without weights.
    """
    check_model(model)
    root = root_of(model)
    found: list[ExpertLayer] = []
    for name, module in root.named_modules():
        if not holds_experts(module):
            continue
        kind = getattr(getattr(module, "config", None), "model_type", None) or type_of(root)
        if kind not in BASES:
            raise ValueError(
                f"the experts at {name!r} are of model_type={kind!r}, which is not in the table of MoE base models; "
                f"those that are: {', '.join(sorted(BASES))}"
            )
        _refuse_form(root, module, name)
        found.append(BaseExperts(root, name, module, BASES[kind], kind))
    return found


def type_of(root: nn.Module) -> str:
    """What a model's config says that it is; of one without, its class."""
    return str(getattr(getattr(root, "config", None), "model_type", type(root).__name__))


def _refuse_form(root: nn.Module, module: nn.Module, name: str) -> None:
    """Raise ValueError for experts whose tensors cannot be cut as they lie."""
    quantized = getattr(root, "hf_quantizer", None) is not None or getattr(root, "is_quantized", False)
    plain = [module._parameters.get(part) for part in FUSED]
    held = [p for p in plain if p is not None]
    if quantized or len(held) != 2 or not all(p.dim() == 3 and p.is_floating_point() for p in held):
        raise ValueError(
            f"the experts at {name!r} are quantized, or not in the fused form of transformers 5 (they hold "
            f"{sorted(module._parameters)}): surgery needs their weights; load the model without quantization, "
            "cut it, save it, and quantize that"
        )
    if any(type(p.data) is not Tensor or p.is_meta for p in held):
        raise ValueError(
            f"the experts at {name!r} are sharded, or have no weights yet ({type(held[0].data).__name__} on "
            f"{held[0].device}): load the model whole, on one device or by device_map"
        )


class BaseExperts(ExpertLayer):
    """The experts of one MoE block of a base model.

    Attributes:
        experts: the module that holds them. block: the one around it, with the router.
        placed: what stands in the block for experts and router, which adapters of PEFT may wrap.
        model_type: the row of the table.
    """

    kind = "base"

    def __init__(self, root: nn.Module, name: str, experts: nn.Module, base: Base, model_type: str) -> None:
        self.root, self.experts, self.base, self.model_type = root, experts, base, model_type
        self.path = plain_path(name)
        around = name
        while around.endswith(".base_layer"):  # adapters of PEFT may wrap the experts, or their router
            around = around.removesuffix(".base_layer")
        owner, _, child = around.rpartition(".")
        self.block = root.get_submodule(owner)
        self.placed = (self.block.get_submodule(child), self.block.get_submodule(base.router))
        self.gate: Any = unwrapped(self.placed[1])
        self.groups = 1 if base.groups is None else int(getattr(self.gate, base.groups, None) or 1)
        if isinstance(base.competes, str):
            self.competes = not getattr(self.gate, base.competes)
        else:
            self.competes = base.competes

    # --- what it is -------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(map(str, range(len(self._down))))

    @property
    def form(self) -> str:
        return f"{self.model_type}: {self.width} to {self.width}"

    @property
    def units(self) -> tuple[int, ...]:
        return (self._down.shape[-2 if self._transposed else -1],) * len(self._down)

    @property
    def top_k(self) -> int | None:
        return int(self.gate.top_k)

    @property
    def width(self) -> int:
        return self._down.shape[-1 if self._transposed else -2]

    @property
    def activation(self) -> str:
        if self.base.activation is not None:
            return self.base.activation
        config: Any = getattr(self.experts, "config", None) or self.root.config
        return str(config.mlp_hidden_act if hasattr(config, "mlp_hidden_act") else config.hidden_act)

    @property
    def _down(self) -> Any:
        return self.experts.down_proj

    @property
    def _transposed(self) -> bool:
        return bool(getattr(self.experts, "is_transposed", False))

    @property
    def map(self) -> Any:
        """The `ExpertMap`; None where each column of the router has an expert of its own."""
        return self.experts._modules.get("expert_map")

    @property
    def adapted(self) -> bool:  # type: ignore[override]
        return _has_adapters(self.placed[0])

    # --- weights ----------------------------------------------------------------------------------------------

    def weights(self, e: int) -> Weights:
        first, bias = self._first(e, ""), self._first(e, "_bias")
        (gate, down), (b_gate, b_down) = self._parted(first), self._parted(bias)
        up, b_up = self._down[e], self.experts._parameters.get("down_proj_bias")
        up = up.t() if self._transposed else up
        return Weights(down.detach(), up.detach(), _detached(b_down), None if b_up is None else _detached(b_up[e]),
                       _detached(gate), _detached(b_gate))  # fmt: skip

    def _first(self, e: int, end: str) -> Tensor | None:
        """What the expert multiplies its input by, (2 r, K) or (r, K); or its bias."""
        held = self.experts._parameters
        tensor = held.get(f"gate_up_proj{end}", held.get(f"up_proj{end}"))
        if tensor is None:
            return None
        return tensor[e].t() if self._transposed and not end else tensor[e]

    def _parted(self, both: Tensor | None) -> tuple[Any, Any]:
        """The parts of gate and up: rows one after the other, or in turn."""
        if both is None or "gate_up_proj" not in self.experts._parameters:
            return None, both
        if getattr(self.experts, "is_concatenated", True):
            gate, up = both.chunk(2)
            return gate, up
        return both[0::2], both[1::2]

    @torch.no_grad()
    def set_weights(self, e: int, weights: Weights) -> None:
        mine = self.weights(e)
        for name in ("down", "up", "gate", "b_down", "b_up", "b_gate"):
            old, new = getattr(mine, name), getattr(weights, name)
            if (old is None) != (new is None) or (old is not None and old.shape != new.shape):
                have, given = (None if t is None else tuple(t.shape) for t in (old, new))
                raise ValueError(
                    f"{name} {given} does not fit the experts at {self.path!r}, whose are {have}: those of a base "
                    "model lie in one tensor, and have one rank"
                )
        if weights.norm is not None or isinstance(weights.scale, Tensor) or weights.scale != 1.0:
            raise ValueError(f"the experts at {self.path!r} have no norm and no scale of their own; fold these in")
        for name in ("down", "up", "gate", "b_down", "b_up", "b_gate"):
            if (view := getattr(mine, name)) is not None:
                view.copy_(getattr(weights, name))

    @torch.no_grad()
    def run(self, e: int, x: Tensor) -> Tensor:
        x = x.to(self._down.dtype)
        every = x.new_full((len(x), 1), e, dtype=torch.long)
        return each_expert(type(self.experts).forward, self.experts, x, every)[:, 0]

    def router_rows(self) -> Tensor | None:
        rows = _tensor_at(self.block, self.base.rows[0])[2]
        if self.map is None:
            return rows.detach()
        columns = [self.map.numbers.tolist().index(e) for e in range(len(self.names))]
        return rows.detach()[columns]

    @property
    def router_entries(self) -> int:
        return int(_tensor_at(self.block, self.base.rows[0])[2].numel())

    # --- cutting ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def keep(self, order: Sequence[int], preserve_mass: bool = False) -> None:
        self.check_keep(order, preserve_mass)
        kept = [int(e) for e in order]
        numbers = self._renumbered({e: place for place, e in enumerate(kept)})
        if not preserve_mass:
            stay = _staying(self, numbers)
            self._keep_columns(stay)
            numbers = [numbers[c] for c in stay]
        self._keep_experts(kept)
        self.settle_map(numbers)
        hook_saving(self.root)

    def check_keep(self, order: Sequence[int], preserve_mass: bool = False) -> None:
        kept = check_order(self, order)
        _refuse_adapted(self)
        if not preserve_mass:
            numbers = self._renumbered({e: place for place, e in enumerate(kept)})
            _check_columns(self, _staying(self, numbers), len(numbers))

    def _renumbered(self, place_of: Mapping[int, int]) -> list[int]:
        """For each of the router's columns the place that its expert gets, -1 for none."""
        columns = list(range(len(self.names))) if self.map is None else self.map.numbers.tolist()
        return [place_of.get(e, -1) for e in columns]

    @torch.no_grad()
    def assign(self, expert_map: Sequence[int]) -> None:
        stands = check_map(self, expert_map)
        _refuse_adapted(self)
        kept = sorted(set(stands))
        numbers = self._renumbered({e: kept.index(other) for e, other in enumerate(stands)})
        self._keep_experts(kept)
        self.settle_map(numbers)
        hook_saving(self.root)

    def _keep_columns(self, stay: Sequence[int]) -> None:
        """Shrink the router, and whatever has an entry for each of its columns."""
        before = _tensor_at(self.block, self.base.rows[0])[2].shape[0]
        for row in self.base.rows:
            owner, name, tensor = _tensor_at(self.block, row)
            axis = tensor.dim() - 1 if tensor.shape[0] == 1 else 0  # (E, d), (E,) or (1, E)
            new = tensor.detach().index_select(axis, torch.tensor(stay, device=tensor.device))
            if isinstance(tensor, nn.Parameter):
                owner._parameters[name] = nn.Parameter(new, tensor.requires_grad)
            else:
                owner._buffers[name] = new
        for module in (self.block, *self.gate.modules()):
            recount(module, before, len(stay))

    def _keep_experts(self, kept: Sequence[int]) -> None:
        before = len(self.names)
        for name, tensor in self.experts._parameters.items():
            if tensor is not None:
                index = torch.tensor(kept, device=tensor.device)
                new = nn.Parameter(tensor.detach().index_select(0, index), tensor.requires_grad)
                self.experts._parameters[name] = new
        recount(self.experts, before, len(kept))

    def shrink(self, experts: int, columns: int) -> None:
        """Have the shapes of so many experts and columns of the router; for a model that has no weights yet.

        Raises:
            ValueError: the layer has fewer.
        """
        have = len(self.names)
        if experts > have or columns > have:
            raise ValueError(
                f"{self.path!r} has {have} experts, and not {experts}, or {columns} columns of its router"
            )
        self._keep_columns(range(columns))
        self._keep_experts(range(experts))

    def settle_map(self, numbers: Sequence[int]) -> None:
        """Have a map where columns and experts are not the same."""
        if list(numbers) == list(range(len(self.names))):
            detach_map(self.experts)
        else:
            ExpertMap(numbers, self._down.device).attach(self.experts)

    # --- choosing, and watching -------------------------------------------------------------------------------

    @contextmanager
    def rechosen(self, choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Iterator[None]:
        """`choose` makes of the indices and weights (N, k) of each row others, in every forward inside the block.

        Experts are numbered as in `names`, -1 for those that are gone. What watches sees what comes of it.
        """

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            x, indices, weights = arguments(args, kwargs)
            if self.map is None:
                return (x, *choose(indices, weights)), {}
            experts, weights = choose(self.map.numbers[indices], weights)
            column = torch.tensor([self.map.numbers.tolist().index(e) for e in range(len(self.names))])
            kept = torch.where(experts >= 0, column.to(indices.device)[experts.clamp_min(0)], indices)
            return (x, kept, weights), {}

        handle = self.experts.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        self.experts.__dict__.setdefault("rechoosing", []).append(handle.id)
        try:
            yield
        finally:
            self.experts.__dict__["rechoosing"].remove(handle.id)
            handle.remove()

    @contextmanager
    def watch(self, callback: Watcher, outputs: bool = False) -> Iterator[None]:
        with ExitStack() as stack:
            context = stack.enter_context(context_of(self.root))
            watched = WatchedBlock(self, callback, context, outputs)
            stack.callback(self.gate.register_forward_hook(watched.see_logits).remove)
            pre_hook = self.experts.register_forward_pre_hook(watched.see_choice, with_kwargs=True, prepend=True)
            stack.callback(pre_hook.remove)
            for number in self.experts.__dict__.get("rechoosing", ()):  # who watches sees what comes of these
                self.experts._forward_pre_hooks.move_to_end(number, last=False)
            if outputs:
                stack.enter_context(standing_in(self.experts, watched.forward))
            yield


def _has_adapters(placed: nn.Module) -> bool:
    return any(hasattr(part, "base_layer") or hasattr(part, "parametrizations") for part in placed.modules())


def _refuse_adapted(layer: BaseExperts) -> None:
    """Raise ValueError where adapters of PEFT sit on the experts or their router."""
    if any(map(_has_adapters, layer.placed)):
        raise ValueError(
            f"adapters sit on the experts at {layer.path!r}, or on their router, and would not fit any more: cut "
            "the base model first, then add adapters"
        )


def _staying(layer: BaseExperts, numbers: Sequence[int]) -> list[int]:
    """The columns of a router that stay, where that of an expert that leaves goes: its place in `numbers` is -1.

    Columns of experts that have left before, whose mass was preserved, stay; without these in the order of experts.
    """
    if layer.map is None:
        return sorted((c for c, number in enumerate(numbers) if number >= 0), key=lambda c: numbers[c])
    before = layer.map.numbers.tolist()
    return [c for c, number in enumerate(numbers) if number >= 0 or before[c] < 0]


def _check_columns(layer: BaseExperts, stay: Sequence[int], total: int) -> None:
    """Raise ValueError where the router cannot choose among the columns that stay, of so many."""
    top_k = layer.top_k or 1
    if len(stay) < top_k:
        raise ValueError(
            f"{len(stay)} experts at {layer.path!r} are fewer than the {top_k} that a token uses: keep more, or "
            "preserve their mass"
        )
    size = total // layer.groups
    if layer.groups > 1:
        members = [sorted(c for c in stay if c // size == group) for group in range(layer.groups)]
        in_blocks = [c // size for c in stay] == sorted(c // size for c in stay)
        if len({len(group) for group in members}) > 1 or len(members[0]) < min(2, size) or not in_blocks:
            raise ValueError(
                f"the router at {layer.path!r} chooses first among {layer.groups} groups of {size} experts, of "
                f"which {[len(group) for group in members]} would stay: keep as many of each, two or more, in "
                "their order"
            )


def _tensor_at(block: nn.Module, name: str) -> tuple[nn.Module, str, Tensor]:
    """The module, the name in it and the tensor of a name inside `block`."""
    path, _, last = name.rpartition(".")
    owner = block.get_submodule(path)
    return owner, last, getattr(owner, last)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
