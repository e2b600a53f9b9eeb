"""The contract of `Router`, over every entry of ROUTERS: a new one is tested from the day it is registered."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor

from mixadapters import ROUTERS, Router
from mixadapters.core.bank import AdapterBank
from mixadapters.core.context import ForwardContext
from mixadapters.core.mixture import Mixture
from mixadapters.core.record import Record
from mixadapters.core.routing import Routing
from mixadapters.core.streams import Stream
from mixadapters.routers import ConstantRouter, LearnedRouter, SingleRouter, build_router

NAMES = sorted(name for name in ROUTERS if not name.startswith("toy_"))
READS_THE_BATCH_ALONE = ("modality",)
EXPERTS = {"single": ["a"]}  # the others take any number
BATCH, LENGTH, WIDTH = 2, 3, 8
every_router = pytest.mark.parametrize("name", NAMES)


def experts_of(name: str) -> list[str]:
    return EXPERTS.get(name, ["a", "b", "c"])


def made(name: str, **arguments) -> Router:
    """With weights that make a difference."""
    router = build_router({"kind": name, **arguments}, WIDTH, experts_of(name))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return router.eval()


def context_of(training: bool = False, **values) -> ForwardContext:
    context = ForwardContext()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    streams = {"": Stream(BATCH, LENGTH, mask)}
    values = {"modality_ids": torch.tensor([[0, 1, 2], [1, 0, -1]]), **values}
    context.enter(Record(training=training, grad=True, open=True, streams=streams, values=values))
    return context


def tokens_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(routing: Routing, rows: int, experts: int) -> Tensor:
    """(N, E) weights, whatever the form."""
    weights = routing.weights
    if routing.indices is None:
        return torch.ones(rows, experts) if weights is None else weights
    weights = torch.ones(routing.indices.shape) if weights is None else weights
    chosen = routing.indices >= 0
    return torch.zeros(rows, experts).scatter_add(1, routing.indices.clamp_min(0), weights * chosen)


@every_router
def test_routing_fits_the_rows_and_the_experts(name) -> None:
    router, rows, count = made(name), BATCH * LENGTH, len(experts_of(name))
    routing = router(tokens_of(), context_of())
    if routing.indices is not None:
        assert routing.indices.shape[0] == rows
        assert not routing.indices.is_floating_point()
        assert int(routing.indices.min()) >= -1
        assert int(routing.indices.max()) < count
    if routing.weights is not None:
        assert routing.weights.shape == (rows, count if routing.indices is None else routing.indices.shape[1])
        assert routing.weights.isfinite().all()
        assert (routing.weights >= 0).all()
    if routing.base_weight is not None:
        assert routing.base_weight.shape == (rows,)
    if routing.probs is not None:
        assert routing.probs.shape[0] == rows
        assert routing.probs.shape[1] >= count
    assert dense(routing, rows, count).shape == (rows, count)


@every_router
def test_flattened_rows_are_routed_alike(name) -> None:
    router, tokens = made(name), tokens_of()
    one, other = router(tokens, context_of()), router(tokens.flatten(0, 1), context_of())
    count = len(experts_of(name))
    assert torch.equal(dense(one, 6, count), dense(other, 6, count))


@every_router
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_come_in_the_dtype_of_the_tokens(name, dtype) -> None:
    bank = AdapterBank(WIDTH, WIDTH)
    for expert in experts_of(name):
        bank.add(expert, 1)
    routing = Mixture(made(name), bank).route(tokens_of(dtype=dtype), context_of())
    assert routing.weights is None or routing.weights.dtype == dtype
    assert routing.base_weight is None or routing.base_weight.dtype == dtype


@every_router
def test_evaluation_is_deterministic_and_leaves_no_trace(name) -> None:
    router, context = made(name), context_of()
    before = {k: v.clone() for k, v in router.state_dict().items()}
    one, other = router(tokens_of(), context), router(tokens_of(), context)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert not context.record.losses
    assert all(torch.equal(v, before[k]) for k, v in router.state_dict().items())


@every_router
def test_weights_carry_gradients_to_all_parameters(name) -> None:
    router = made(name).train()
    tokens = tokens_of().requires_grad_()
    context = context_of(training=True, prompt_mask=torch.ones(BATCH, LENGTH))
    count = len(experts_of(name))
    weights = dense(router(tokens, context), 6, count)
    parameters = list(router.parameters())
    if not parameters:
        assert not weights.requires_grad
        return
    (weights * torch.randn(6, count)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
    assert tokens.grad.abs().max() > 0


@every_router
def test_constant_weights_are_those_of_every_input(name) -> None:
    router, count = made(name), len(experts_of(name))
    constant = router.constant()
    weights = [dense(router(tokens_of(seed), context_of()), 6, count) for seed in (0, 1)]
    if constant is None:
        assert torch.equal(*weights) is (name in READS_THE_BATCH_ALONE)
    else:
        assert len(constant) == count
        for seen in weights:
            torch.testing.assert_close(seen, torch.tensor(constant).expand(6, -1))
    if router.always_first:
        assert constant == [1.0]


@every_router
def test_router_is_built_from_its_name_copied_and_saved(name) -> None:
    router = build_router(name, WIDTH, experts_of(name))
    assert type(router) is ROUTERS[name]
    assert isinstance(router, Router)
    assert (router.in_features, router.experts) == (WIDTH, experts_of(name))
    one, count = made(name), len(experts_of(name))
    other = build_router({"kind": name}, WIDTH, experts_of(name)).eval()
    other.load_state_dict(one.state_dict())
    for twin in (other, copy.deepcopy(one)):
        weights = [dense(r(tokens_of(), context_of()), 6, count) for r in (one, twin)]
        assert torch.equal(*weights)
    assert ROUTERS[name].__doc__


@every_router
def test_router_runs_a_bank_in_a_mixture_and_under_the_compiler(name) -> None:
    router, names = made(name), experts_of(name)
    bank = AdapterBank(WIDTH, 5)
    for rank, expert in enumerate(names, 2):
        bank.add(expert, rank, init_weights=False)
    mixture, x, y = Mixture(router, bank), tokens_of(), torch.randn(BATCH, LENGTH, 5)
    weights = dense(router(x, context_of()), 6, len(names))
    experts = [e.up(torch.nn.functional.gelu(e.down(x))) for e in bank.experts.values()]
    expected = y + sum(w.view(BATCH, LENGTH, 1) * e for w, e in zip(weights.unbind(1), experts, strict=True))
    torch.testing.assert_close(mixture(x, y, context_of()), expected)
    torch._dynamo.reset()
    compiled = torch.compile(mixture, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y, context_of()), expected)


@every_router
def test_wrong_arguments_are_named(name) -> None:
    with pytest.raises(ValueError, match=rf"{ROUTERS[name].__name__} takes no argument 'hiden'"):
        build_router({"kind": name, "hiden": 3}, WIDTH, experts_of(name))
    build_router(name, WIDTH, experts_of(name), hiden=3)  # defaults are for those that take them


@pytest.mark.parametrize("spec", ["sotfmax", {"kind": "sotfmax"}])
def test_unknown_router_is_told_the_nearest(spec) -> None:
    with pytest.raises(ValueError, match=r"unknown router 'sotfmax'.*Did you mean 'softmax'\?"):
        build_router(spec, WIDTH, ["a"])


def test_specification_needs_a_kind() -> None:
    with pytest.raises(ValueError, match=r"needs a 'kind'; have \['constant'"):
        build_router({"k": 2}, WIDTH, ["a"])
    spec = {"kind": "constant", "weights": [2.0]}
    assert build_router(spec, WIDTH, ["a"]).constant() == [2.0]
    assert spec == {"kind": "constant", "weights": [2.0]}


def test_said_arguments_go_before_defaults() -> None:
    gate = build_router({"kind": "softmax", "temperature": 3.0}, WIDTH, ["a"], temperature=2.0, hidden=[4], other=1)
    assert isinstance(gate, LearnedRouter)
    assert gate.temperature == 3.0
    assert gate.output.in_features == 4


def test_constant_router_takes_a_weight_for_each_expert() -> None:
    assert ConstantRouter(WIDTH, ["a", "b"]).constant() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"weights=\[1.0\] must have one entry for each expert of \['a', 'b'\]"):
        ConstantRouter(WIDTH, ["a", "b"], [1.0])


def test_single_router_sends_every_token_to_its_expert() -> None:
    routing = SingleRouter(WIDTH, ["a"])(tokens_of(), context_of())
    assert SingleRouter.always_first
    assert torch.equal(dense(routing, 6, 1), torch.ones(6, 1))


def test_every_file_registers_what_it_defines() -> None:
    classes = [cls for cls in Router.__subclasses__() if cls.__module__.startswith("mixadapters.routers.")]
    while classes:
        cls = classes.pop()
        subclasses = [c for c in cls.__subclasses__() if c.__module__.startswith("mixadapters.routers.")]
        classes += subclasses
        if not subclasses and not inspect.isabstract(cls):
            assert any(ROUTERS[name] is cls for name in ROUTERS), cls
