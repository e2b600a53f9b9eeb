"""The operation as torch sees it: two operators, opaque to the compiler, and the autograd function over them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import _C, Tensor

from mixadapters.kernels import backends, gathered, opened, reference
from mixadapters.kernels.problem import DIFFERENTIABLE, Problem, without_autocast

_PROBLEM = (
    "Tensor x, Tensor down, Tensor up, int[] ranks, Tensor? b_down, Tensor? b_up, Tensor? gate, Tensor? b_gate, "
    "Tensor? indices, Tensor? weights, Tensor? scale, Tensor? base, Tensor? base_weight, str act, float dropout, "
    "Tensor? seed, SymInt run, bool batch_invariant, str backend"
)
_NAMES = Problem._fields
# Places of a problem's fields among the arguments.
_BASE, _BASE_WEIGHT = _NAMES.index("base"), _NAMES.index("base_weight")
_INSIDE = tuple(_NAMES.index(name) for name in DIFFERENTIABLE)  # whose gradients a backend computes
_FLOATS = (*_INSIDE, _BASE, _BASE_WEIGHT)
_RANKS = _NAMES.index("ranks")
_TENSORS = (*_FLOATS, _NAMES.index("indices"), _NAMES.index("seed"))
_PLAIN = "plain"  # by operations that torch differentiates, `gathered.differentiable`

library = torch.library.Library("mixadapters", "DEF")
library.define(f"lowrank({_PROBLEM}, bool keep) -> (Tensor, Tensor[])")
library.define(f"lowrank_backward(Tensor grad, Tensor[] kept, {_PROBLEM}, bool[] needs) -> Tensor[]")


def _forward(*args):
    *given, backend, keep = args
    p = _problem(given)
    with torch.no_grad(), without_autocast(p.x):
        y, kept = _run(p, backend, keep)
    return y, list(kept)


def _run(p, backend, keep):
    p.check_indices()
    return backends.pick(p, backend, p.x.shape[0], training=keep, layout_fixed=keep).forward(p, keep)


def _backward(grad, kept, *args):
    *given, backend, needs = args
    p = _problem(given)
    names = [name for name, needed in zip(DIFFERENTIABLE, needs, strict=True) if needed]
    with torch.no_grad(), without_autocast(p.x):
        module = backends.pick(p, backend, p.x.shape[0], training=True, layout_fixed=True)
        gradients = module.backward(p, tuple(kept), grad.contiguous(), frozenset(names))
    return [_laid_out(gradients[name], name, getattr(p, name)) for name in names]


def _forward_fake(*args):
    *given, backend, keep = args
    p = _problem(given)
    like = p.x if p.base is None else p.base
    y = like.new_empty(p.x.shape[0], p.up.shape[0])
    # All routed backends keep the same, so the choice need not know how many rows there are.
    return y, list(backends.pick(p, backend, 0, training=True, layout_fixed=True).keeps(p)) if keep else []


def _backward_fake(grad, kept, *args):
    *given, _, needs = args
    p = _problem(given)
    return [_like(name, getattr(p, name)) for name, needed in zip(DIFFERENTIABLE, needs, strict=True) if needed]


def _problem(given: list) -> Problem:
    given[_RANKS] = tuple(given[_RANKS])
    return Problem._make(given)


def _like(name, field):
    """Gradients are contiguous, but that of `up` is laid out as `up` is: it may be a view of rows (R, M)."""
    return torch.empty_like(field) if name == "up" else field.new_empty(field.shape)


def _laid_out(gradient, name, field):
    laid_out = gradient.stride() == field.stride() if name == "up" else gradient.is_contiguous()
    return gradient if laid_out and gradient.dtype == field.dtype else _like(name, field).copy_(gradient)


for _name, _real, _fake in (("lowrank", _forward, _forward_fake), ("lowrank_backward", _backward, _backward_fake)):
    library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mixadapters::{_name}", _fake, lib=library)
_forward_op = torch.ops.mixadapters.lowrank.default
_backward_op = torch.ops.mixadapters.lowrank_backward.default


class _Lowrank(torch.autograd.Function):
    """The operators as one differentiable function of the fields of Problem, in order, and a backend's name."""

    @staticmethod
    def forward(ctx, *args):
        run = _forward if nobody_looks_on(args[0]) else _forward_op
        y, kept = run(*args, True)
        # The frozen layer's output is kept for its weight's gradient only.
        keeps_base = ctx.needs_input_grad[_BASE_WEIGHT]
        ctx.save_for_backward(*(args[i] if i != _BASE or keeps_base else None for i in _TENSORS), *kept)
        ctx.others = tuple(None if i in _TENSORS else arg for i, arg in enumerate(args))
        return y

    @staticmethod
    def backward(ctx, grad):
        args = list(ctx.others)
        saved = ctx.saved_tensors  # once: checkpointing refuses to unpack again
        for i, tensor in zip(_TENSORS, saved, strict=False):
            args[i] = tensor
        needs = ctx.needs_input_grad
        out: list[Tensor | None] = [None] * len(args)
        base, base_weight = args[_BASE], args[_BASE_WEIGHT]
        if needs[_BASE]:
            out[_BASE] = grad if base_weight is None else grad * base_weight.to(grad.dtype).unsqueeze(1)
        if needs[_BASE_WEIGHT]:
            wide = torch.promote_types(grad.dtype, torch.float32)
            out[_BASE_WEIGHT] = (grad.to(wide) * base).sum(1).to(base_weight.dtype)
        args[_BASE] = args[_BASE_WEIGHT] = None
        asked = [i for i in _INSIDE if needs[i]]
        found: Sequence[Tensor] = ()
        if asked and _by_definition(grad):
            found = _gradients(args, grad, asked)
        elif asked:
            run = _backward if nobody_looks_on(grad) else _backward_op
            found = run(grad, saved[len(_TENSORS) :], *args, [needs[i] for i in _INSIDE])
        for i, gradient in zip(asked, found, strict=True):
            out[i] = gradient
        return tuple(out)


def _by_definition(grad: Tensor) -> bool:
    """Whether gradients are to be differentiated (`create_graph`), or are many at a time (`is_grads_batched`)."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or _C._functorch.is_legacy_batchedtensor(grad)


def _gradients(args: list[Any], grad: Tensor, asked: list[int]) -> tuple[Tensor, ...]:
    """Those of the fields at these places, by plain operations that torch differentiates in turn."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(args[0]):
        # Views of them: one may be computed from another, and each gradient is of the operation alone.
        given = [arg.view_as(arg) if i in asked else arg for i, arg in enumerate(args[:-1])]
        y = reference.forward(_problem(given))
        wanted = [given[i] for i in asked]
        return torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=again, materialize_grads=True)


def call(p: Problem, backend: str) -> Tensor:
    """The operator on a problem, with gradients where any are wanted; backend "" leaves the choice to the rule."""
    given: tuple[Any, ...] = p
    grad = torch.is_grad_enabled() and any(given[i] is not None and given[i].requires_grad for i in _FLOATS)
    if nobody_looks_on(p.x):
        # Layers that share their indices and are alike ask once: it takes as long as a small product.
        x, width = p.x, p.up.shape[0]
        alike = (p.ranks, p.run, p.batch_invariant, p.dropout > 0, x.dtype, x.is_cpu, x.shape[1], width, backend, grad)
        way = p.derived(("way", *alike), lambda: _way(p, backend, grad))
        if way == _PLAIN:
            return gathered.differentiable(p)
        return _Lowrank.apply(*p, way) if grad else backends.module(way).forward(p, False)[0]
    if _transformed():  # which know what becomes of plain operations alone
        return reference.forward(p)
    if not torch.is_grad_enabled() and not backend:
        y = opened.forward(p)
        if y is not None:
            return y
    return _Lowrank.apply(*p, backend) if grad else _forward_op(*p, backend, False)[0]


def _way(p: Problem, backend: str, grad: bool) -> str:
    """Which backend runs the problem where nobody looks on, or `_PLAIN`. Shapes, dtypes and values of indices decide.

    A word, as it goes along where indices are pickled, in a routing that somebody keeps.
    """
    p.check_indices()
    # There is no graph, in which what is kept has one layout for all numbers of rows.
    chosen = backends.pick(p, backend, len(p.x), training=grad, layout_fixed=False)
    return _PLAIN if chosen is gathered and gathered.plain(p, grad) else backends.name_of(chosen)


def nobody_looks_on(x: Tensor) -> bool:
    """Whether torch need not see the operators: it casts, compiles, traces, counts and transforms nothing."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()  # first: the compiler knows nothing of the others
        and not _C._is_any_autocast_enabled()
        and not _C._len_torch_dispatch_stack()
        and not _C._get_tracing_state()
        and _C._functorch.peek_interpreter_stack() is None
    )


def _transformed() -> bool:
    """Whether a transform of torch.func is at work."""
    return not torch.compiler.is_compiling() and _C._functorch.peek_interpreter_stack() is not None
