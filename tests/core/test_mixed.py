from __future__ import annotations

import pytest
import torch
from banks import WIDTH, Given, bank_of, routed, single
from torch import Tensor, nn

from mixadapters import kernels
from mixadapters.core.adapter import Adapter, Chain
from mixadapters.core.context import ForwardContext
from mixadapters.core.mixed import MixedBatch
from mixadapters.core.mixture import Mixture
from mixadapters.core.record import Record
from mixadapters.core.routing import Routing
from mixadapters.core.rows import RowNames
from mixadapters.core.streams import PackedRequests, Stream
from mixadapters.routers import Router, SingleRouter, SoftmaxGate

BATCH, LENGTH = 3, 4


class Scored(Router):
    """A softmax over experts, with weights of its own."""

    def __init__(self, experts: list[str]) -> None:
        super().__init__(WIDTH, experts)
        self.score = nn.Linear(WIDTH, len(experts))

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        return Routing(weights=self.score(tokens.reshape(-1, WIDTH)).softmax(-1))


@pytest.fixture
def context() -> ForwardContext:
    context = ForwardContext()
    context.enter(Record(streams={"": Stream(batch=BATCH, length=LENGTH)}))
    return context


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH)


@pytest.fixture
def y() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH)


class Doubling(Adapter):
    """No mixture: y -> 2 y."""

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        return 2 * y


class Negated(Mixture):
    """A mixture with a forward of its own."""

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        return -super().forward(x, y, context)


def counted(monkeypatch) -> list[int]:
    calls: list[int] = []
    plain = kernels.lowrank
    monkeypatch.setattr(kernels, "lowrank", lambda *a, **k: calls.append(len(k["ranks"])) or plain(*a, **k))
    return calls


ALL = torch.arange(BATCH * LENGTH)
GROUPS = {
    # case: (adapters, experts in each call of the op)
    "single": (lambda: [single(3), single(5, seed=1)], [2]),
    "kinds": (lambda: [single(3), single(5, seed=1, glu=True)], [1, 1]),
    "insertions": (lambda: [single(3), single(5, seed=1, insertion="sequential")], [1, 1]),
    "routed": (
        lambda: [
            routed(Routing(torch.stack([ALL % 2, -1 - 0 * ALL], 1), torch.rand(12, 2)), 3, 2),
            routed(Routing(weights=torch.rand(12, 3), base_weight=torch.rand(12)), 2, 4, 1, seed=1),
        ],
        [5],
    ),
    "routed beside single": (lambda: [single(3), routed(Routing((ALL % 2).unsqueeze(1)), 3, 2, seed=1)], [3]),
    "base_weight of one alone": (
        lambda: [routed(Routing(base_weight=torch.rand(12)), 2), routed(Routing(), 3, 1, seed=1)], [3],
    ),
    "no mixture": (lambda: [single(3), Doubling()], [1]),
    "chains": (
        lambda: [Chain(a=single(3), b=single(2, seed=2)), Chain(a=single(5, seed=1), b=single(4, seed=3))],
        [2, 2],
    ),
    "chains of which one is shorter": (
        lambda: [Chain(b=single(2, insertion="sequential")), Chain(a=single(5, seed=1), b=single(4, 3, "sequential"))],
        [1, 2],
    ),
    "chains in another order": (
        lambda: [
            Chain(a=single(3, 0, "sequential"), b=single(2, 1, "sequential")),
            Chain(b=single(5, 2, "sequential"), a=single(4, 3, "sequential")),
        ],
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("flat", [False, True])
def test_each_row_goes_through_the_adapter_it_names(context, monkeypatch, x, y, case, flat) -> None:
    make, expected_calls = GROUPS[case]
    torch.manual_seed(1)
    adapters = make()
    whole = [adapter(x, y, context) for adapter in adapters]
    calls = counted(monkeypatch)
    if flat:  # each token is a row of its own
        out = MixedBatch(adapters, (1, -1, 0))(x.flatten(0, 1), y.flatten(0, 1), context).view_as(y)
    else:
        out = MixedBatch(adapters, (1, -1, 0))(x, y, context)
    assert expected_calls is None or calls == expected_calls
    torch.testing.assert_close(out[0], whole[1][0])
    assert torch.equal(out[1], y[1])
    torch.testing.assert_close(out[2], whole[0][2])


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: single(3), Doubling, lambda: Chain(a=single(2), b=Doubling())])
def test_tokens_of_a_packed_row_go_through_the_adapter_of_their_request(context, make) -> None:
    """From step to step other requests, of other numbers of tokens, with the adapters that were there before."""
    adapters, named = [make(), make()], RowNames(["__base__", "x", "y"])
    batch = MixedBatch(adapters, (-1, 0, 1))
    for lengths, numbers in (((2, 1, 4), (1, 0, 2)), ((1, 1), (2, 2)), ((3, 2), (0, 1))):
        requests = PackedRequests(lengths, named, numbers)
        stream = Stream(1, sum(lengths), packed=True, requests=requests)
        context.enter(Record(streams={"": stream}, values={"adapter_names": named}))
        x, y = torch.randn(2, 1, sum(lengths), WIDTH)
        together, start = batch(x, y, context), 0
        for length, number in zip(lengths, numbers, strict=True):
            own = slice(start, start := start + length)
            context.enter(Record(streams={"": Stream(batch=1, length=length)}))
            alone = y[:, own] if number == 0 else adapters[number - 1](x[:, own], y[:, own], context)
            torch.testing.assert_close(together[:, own], alone)


def test_layers_and_steps_of_one_call_share_one_tensor_of_owners(monkeypatch, x, y) -> None:
    seen: list[Tensor] = []
    lowrank = kernels.lowrank
    monkeypatch.setattr(kernels, "lowrank", lambda *a, **k: (seen.append(k["indices"]), lowrank(*a, **k))[1])
    names, context = RowNames(["b", "__base__", "a"]), ForwardContext()
    layers = [MixedBatch([single(2), single(2, seed=1)], (1, -1, 0)) for _ in range(2)]
    for length in (LENGTH, LENGTH, 1, 1):  # a prompt, twice, and the steps that follow
        context.enter(Record(streams={"": Stream(BATCH, length)}, values={"adapter_names": names}))
        for layer in layers:
            layer(x[:, :length], y[:, :length], context)
    assert len({id(indices) for indices in seen[:4]}) == len({id(indices) for indices in seen[4:]}) == 1
    assert seen[0] is not seen[-1]


def test_mixture_with_a_forward_of_its_own_keeps_it(context, x, y) -> None:
    mine = Negated(SingleRouter(WIDTH, ["expert0"]), bank_of(3))
    out = MixedBatch([mine, single(2, seed=1)], (0, 1, -1))(x, y, context)
    torch.testing.assert_close(out[0], mine(x, y, context)[0])


def test_routers_of_a_mixed_batch_know_their_rows(context, x, y) -> None:
    seen: list[Tensor] = []

    class Asking(Given):
        def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
            seen.append(context.record.own_rows)
            return super().forward(tokens, context)

    mixtures = [Mixture(Asking(["expert0"], Routing()), bank_of(2, seed=seed)) for seed in (0, 1)]
    MixedBatch(mixtures, (1, -1, 0))(x, y, context)
    rows = torch.tensor([1, -1, 0]).repeat_interleave(LENGTH)
    assert [torch.equal(mask, rows == i) for i, mask in enumerate(seen)] == [True, True]
    assert context.record.own_rows is None
    mixtures[0](x, y, context)
    assert seen[-1] is None
    lone = Negated(Asking(["expert0"], Routing()), bank_of(2))  # with a forward of its own
    MixedBatch([lone, mixtures[0]], (0, 1, -1))(x, y, context)
    assert torch.equal(seen[-2], torch.tensor([True, False, False]).repeat_interleave(LENGTH))
    assert context.record.own_rows is None


def test_gradients_of_a_mixed_batch_stay_with_its_rows(context, x, y) -> None:
    adapters = [single(3), single(5, seed=1)]
    MixedBatch(adapters, (1, -1, -1))(x, y, context).sum().backward()
    assert all((p.grad == 0).all() for p in adapters[0].parameters())
    got = [p.grad.clone() for p in adapters[1].parameters()]
    adapters[1].zero_grad()
    adapters[1](x, y, context)[0].sum().backward()
    for one, parameter in zip(got, adapters[1].parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


def test_batches_of_some_adapters_after_batches_of_all_name_their_own(context, x, y) -> None:
    a, b, c = (single(rank, seed=rank) for rank in (3, 5, 4))
    alone = {adapter: adapter(x, y, context) for adapter in (a, b, c)}
    with torch.no_grad():
        for adapters in ([a, b, c], [a, c], [c, b], [b, c, a], [c]):
            owner = [i % len(adapters) for i in range(BATCH)]
            out = MixedBatch(adapters, owner)(x, y, context)
            for row, i in enumerate(owner):
                torch.testing.assert_close(out[row], alone[adapters[i]][row])


def test_every_call_of_a_model_uses_the_weights_of_now(context, x, y) -> None:
    adapters = [single(3), single(5, seed=1)]
    with torch.no_grad():
        before = MixedBatch(adapters, (1, 0, -1))(x, y, context)
        adapters[1].bank.experts["expert0"].up.weight.data.mul_(2.0)  # which no version counter sees
        after = MixedBatch(adapters, (1, 0, -1))(x, y, context)
        torch.testing.assert_close(after[0], adapters[1](x, y, context)[0])
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1:], before[1:])


def scored(seed: int) -> Mixture:
    torch.manual_seed(seed)
    bank = bank_of(3, 2, seed=seed)
    return Mixture(Scored(bank.names), bank)


KINDS = {
    "each its only expert": lambda: [single(3), single(5, seed=1)],
    "with routers": lambda: [scored(0), scored(1)],
    "one alone": lambda: [Negated(SingleRouter(WIDTH, ["expert0"]), bank_of(3)), single(5, seed=1)],
    "chains": lambda: [Chain(a=scored(0), b=single(2)), Chain(a=scored(1), b=single(4, seed=3))],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", ["adapter", "row", "gradient"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_broken_adapter_leaves_the_rows_and_gradients_of_the_others_alone(
    context, x, y, kind, broken, value
) -> None:
    adapters = KINDS[kind]()
    plan = MixedBatch(adapters, (0, 1, -1))
    upstream = torch.randn(BATCH, LENGTH, WIDTH)

    def outcome(x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        x, base = x.clone().requires_grad_(), y.clone().requires_grad_()
        out = plan(x, base, context)
        wanted = [x, base, *adapters[1].parameters()]
        found = torch.autograd.grad(out, wanted, upstream, materialize_grads=True)
        return (out.detach()[1:], *(t[1:] for t in found[:2]), *found[2:])  # all but the row of the first adapter

    sound = outcome(x, upstream)
    x, upstream = x.clone(), upstream.clone()
    if broken == "adapter":
        with torch.no_grad():
            for parameter in adapters[0].parameters():
                parameter.fill_(value)
    else:
        (x if broken == "row" else upstream)[0] = value
    for found, expected in zip(outcome(x, upstream), sound, strict=True):
        torch.testing.assert_close(found, expected)


class Scaled(Adapter):
    """No mixture, with a parameter and a product with what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        return y * self.factor(x).tanh()


def gated(seed: int) -> Mixture:
    torch.manual_seed(seed)
    bank = bank_of(2, 3, seed=seed)
    router = SoftmaxGate(WIDTH, bank.names, balance_coef=1.0)
    torch.nn.init.normal_(router.output.weight)
    return Mixture(router, bank)


@pytest.mark.parametrize("make", [lambda: [gated(0), gated(1)], lambda: [Scaled(), Scaled()]], ids=["routed", "lone"])
@pytest.mark.parametrize("planted", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weights", "rows"])
def test_what_is_broken_in_one_adapter_stays_out_of_its_neighbours(context, x, y, make, planted, where) -> None:
    """Outputs, gradients of rows, of parameters and of auxiliary losses of the others."""
    found = []
    for broken in (False, True):
        torch.manual_seed(2)
        adapters = make()
        context.enter(Record(training=True, grad=True, open=True, streams={"": Stream(batch=BATCH, length=LENGTH)}))
        source, base = x.clone(), y.clone()
        with torch.no_grad():
            if broken and where == "weights":
                for parameter in adapters[1].parameters():
                    parameter.fill_(planted)
            if broken and where == "rows":
                source[1] = base[1] = planted
        source.requires_grad_(True)
        base.requires_grad_(True)
        out = MixedBatch(adapters, (0, 1, 0))(source, base, context)
        loss = out[[0, 2]].square().sum()
        parameters = list(adapters[0].parameters())
        of_rows = torch.autograd.grad(loss, [source, base], retain_graph=True)
        of_parameters = torch.autograd.grad(loss, parameters)
        found.append([out[[0, 2]], *(grad[[0, 2]] for grad in of_rows), *of_parameters])
    for clean, beside in zip(*found, strict=True):
        torch.testing.assert_close(beside, clean)
