"""Experts of several adapters in one call: whatever happens to their parameters, the call uses what they are now."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from functools import partial

import banks
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mixadapters import kernels
from mixadapters.core.bank import AdapterBank, Expert, pack
from mixadapters.core.routing import Routing
from mixadapters.kernels import ACTIVATIONS

WIDTH_IN, WIDTH_OUT = 6, 5
bank_of = partial(banks.bank_of, width_in=WIDTH_IN, width_out=WIDTH_OUT)
FORMS = {
    "low rank": {"bias": False, "activation": "identity"},
    "bottleneck": {},
    "gated": {"glu": True, "activation": "silu"},
    "scaled": {"scale": 0.5},
    "learnable scale": {"scale": None},
    "own norm": {"layer_norm": True},
}
ROUTES = torch.tensor([[0], [2], [-1], [1], [0]])


def adapters(*ranks: int, **form) -> list[AdapterBank]:
    """Banks of one expert each."""
    return [bank_of(rank, seed=i, **form) for i, rank in enumerate(ranks)]


def experts_of(banks: list[AdapterBank]) -> list[Expert]:
    return [expert for bank in banks for expert in bank.experts.values()]


def rows(banks: list[AdapterBank], count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH_IN, generator=generator).to(next(banks[0].parameters()).dtype)


def run(banks: list[AdapterBank], routes: Tensor = ROUTES, seed: int = 0) -> Tensor:
    return pack(banks, None)(rows(banks, len(routes), seed), Routing(routes))


def expected(banks: list[AdapterBank], routes: Tensor = ROUTES, seed: int = 0) -> Tensor:
    """Row by row, by the modules that hold the parameters."""
    experts = [(bank, expert) for bank in banks for expert in bank.experts.values()]
    found = []
    for x, (e,) in zip(rows(banks, len(routes), seed), routes.tolist(), strict=True):
        if e < 0:
            found.append(x.new_zeros(WIDTH_OUT))
            continue
        bank, expert = experts[e]
        act = ACTIVATIONS[bank.activation]
        x = x if expert.norm is None else expert.norm(x)
        h = act(expert.down(x)) if expert.gate is None else act(expert.gate(x)) * expert.down(x)
        found.append(expert.up(h) * (bank.scale if expert.scale is None else expert.scale.weight))
    return torch.stack(found)


def assert_right(banks: list[AdapterBank], routes: Tensor = ROUTES) -> None:
    torch.testing.assert_close(run(banks, routes), expected(banks, routes))


# --- parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_contiguous_and_stay_where_they_are(form) -> None:
    """What shards, flattens or saves parameters by their memory takes nothing else."""
    banks = adapters(3, 1, 4, **FORMS[form])
    leaves = [p for bank in banks for p in bank.parameters()]
    before = [(p.data_ptr(), p.stride(), p.untyped_storage().nbytes()) for p in leaves]
    assert_right(banks)
    run(banks).square().sum().backward()
    assert all(p.is_contiguous() and p.grad.is_contiguous() for p in leaves)
    assert [(p.data_ptr(), p.stride(), p.untyped_storage().nbytes()) for p in leaves] == before
    state = {f"{i}.{name}": tensor for i, bank in enumerate(banks) for name, tensor in bank.state_dict().items()}
    stored = load(save(state))
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())


def test_weights_that_were_saved_transposed_in_memory_load_contiguous() -> None:
    bank, other = bank_of(3), bank_of(3, seed=1)
    state = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in other.state_dict().items()}
    bank.load_state_dict(state)
    assert all(p.is_contiguous() for p in bank.parameters())
    assert torch.equal(run([bank], ROUTES.clamp_max(0)), run([other], ROUTES.clamp_max(0)))


def test_one_expert_alone_is_not_copied() -> None:
    bank = bank_of(3, glu=True)
    expert = experts_of([bank])[0]
    arguments = pack([bank], None).arguments
    for name, parameter in (("w_down", expert.down), ("w_up", expert.up), ("w_gate", expert.gate)):
        assert arguments[name] is parameter.weight
    assert arguments["scale"] is None


def test_adapters_that_the_batch_does_not_name_are_not_touched(monkeypatch) -> None:
    banks = adapters(3, 1, 4, 2)
    given: list[tuple[int, ...]] = []
    plain = kernels.lowrank
    monkeypatch.setattr(kernels, "lowrank", lambda *a, **k: given.append(tuple(k["ranks"])) or plain(*a, **k))
    for members in ([0, 1, 2], [0, 2], [3, 1, 0], [2, 0, 3, 1]):
        assert_right([banks[i] for i in members], torch.arange(-1, len(members)).unsqueeze(1))
    assert given == [(3, 1, 4), (3, 4), (2, 1, 3), (4, 3, 2, 1)]


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_the_parameters(form) -> None:
    banks = adapters(3, 1, 4, **FORMS[form])
    twins = copy.deepcopy(banks)
    for _ in range(2):  # accumulated
        run(banks).square().sum().backward()
        expected(twins).square().sum().backward()
    for one, other in zip(banks, twins, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_frozen_parameters_get_no_gradient() -> None:
    banks = adapters(3, 1, 4)
    banks[1].requires_grad_(False)
    run(banks).square().sum().backward()
    assert all(p.grad is None for p in banks[1].parameters())
    assert all(p.grad is not None for p in banks[0].parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_of_single_adapters_agree_with_one_by_one(fused) -> None:
    banks = adapters(3, 1, 4)
    twins = copy.deepcopy(banks)
    for group, function in ((banks, run), (twins, expected)):
        optimizers = [
            torch.optim.AdamW(bank.parameters(), lr=0.1 * (i + 1), fused=fused) for i, bank in enumerate(group)
        ]
        for step in range(3):
            function(group, seed=step).square().sum().backward()
            optimizers[step].step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    torch.testing.assert_close(run(banks), expected(twins))


def test_a_change_between_forward_and_backward_is_noticed_where_it_matters() -> None:
    banks = adapters(3)
    loss = run(banks, torch.tensor([[0], [0]])).square().sum()
    with torch.no_grad():
        next(banks[0].parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- what is kept between forwards -------------------------------------------------------------------------------


def test_steps_of_a_generation_copy_no_weight(monkeypatch) -> None:
    banks, kept = adapters(3, 1, 4), {}
    with torch.no_grad():
        first = pack(banks, None, kept)

        def refuse(*_, **__):
            raise AssertionError("a copy")

        monkeypatch.setattr(torch, "cat", refuse)
        monkeypatch.setattr(torch, "stack", refuse)
        assert all(pack(banks, None, kept) is first for _ in range(3))


def test_a_few_rows_of_a_generation_go_past_the_operation(monkeypatch) -> None:
    banks, routes = adapters(4, 4, 4), torch.tensor([[0, 1], [2, 1], [2, 2]])
    x, base, weights = rows(banks, 3), torch.randn(3, WIDTH_OUT), torch.rand(3, 2)
    by_operation = pack(banks, None)(x, Routing(routes, weights), base)
    with torch.no_grad():
        packed = pack(banks, None, {})
        calls = []
        monkeypatch.setattr(kernels, "lowrank", lambda *args, **kwargs: calls.append(args))
        torch.testing.assert_close(packed(x, Routing(routes, weights), base), by_operation)
        assert not calls
        packed(x, Routing(routes, weights), base, dropout=0.5)
        assert len(calls) == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_generation_runs_with_the_weights_of_its_first_step(form) -> None:
    banks = adapters(3, 1, 4, **FORMS[form])
    kept, x = {}, rows(banks, len(ROUTES))
    first = expected(banks).detach()
    for parameter in [p for bank in banks for p in bank.parameters()]:
        with torch.no_grad():
            torch.testing.assert_close(pack(banks, None, kept)(x, Routing(ROUTES)), first)
            parameter.mul_(1.5)
            torch.testing.assert_close(pack(banks, None, {})(x, Routing(ROUTES)), expected(banks))
    out = pack(banks, None, kept)(x, Routing(ROUTES))  # with gradients: those of now
    torch.testing.assert_close(out, expected(banks))
    out.sum().backward()
    assert all(p.grad is not None for bank in banks for p in bank.parameters())


def test_weights_that_a_bank_computes_are_asked_for_in_every_forward() -> None:
    class Drawn(AdapterBank):
        def weights(self, context):
            return [w._replace(down=torch.randn_like(w.down)) for w in super().weights(context)]

    bank = Drawn(WIDTH_IN, WIDTH_OUT)
    bank.add("a", 2, init_weights=False)
    bank.add("b", 2, init_weights=False)
    kept = {}
    with torch.no_grad():
        first, second = (pack([bank], None, kept) for _ in range(2))
        assert not torch.equal(first.arguments["w_down"], second.arguments["w_down"])
        assert not kept


def test_parameters_born_in_inference_mode_work() -> None:
    with torch.inference_mode():
        banks = adapters(3, 1, 4)
        assert_right(banks)
        torch.testing.assert_close(pack(banks, None, {})(rows(banks, len(ROUTES)), Routing(ROUTES)), expected(banks))


# --- parameters that move ----------------------------------------------------------------------------------------


def cast(banks):
    for bank in banks:
        bank.to(torch.float64)


def assign(banks):
    for bank in banks[:2]:
        state = {k: v.clone() * 2 for k, v in bank.state_dict().items()}
        bank.load_state_dict(state, assign=True)
        bank.requires_grad_(True)


def reassign_data(banks):
    for p in banks[1].parameters():
        p.data = p.data.clone() * 3


def replace(banks):
    for module in [m for bank in banks for m in bank.modules() if isinstance(m, nn.Linear)]:
        module.weight = nn.Parameter(module.weight.detach() * 0.5)


def replace_expert(banks):
    banks[1].remove("expert0")
    banks[1].add("expert0", 1, init_weights=False)


class Sharded(nn.Parameter):
    """A subclass, whose memory may be anything."""


def with_subclass(banks):
    linear = experts_of(banks)[1].down
    linear.weight = Sharded(linear.weight.detach())


def with_function(banks):
    parametrize.register_parametrization(experts_of(banks)[1].up, "weight", nn.Tanh())


def with_flat_memory(banks):
    """As sharding and fused optimizers do: parameters are views of a buffer."""
    leaves = [p for bank in banks for p in bank.parameters()]
    flat = torch.cat([p.detach().flatten() for p in leaves])
    for p, part in zip(leaves, flat.split([p.numel() for p in leaves]), strict=True):
        p.data = part.view_as(p)


def with_shared_memory(banks):
    banks[1].share_memory()


def with_tied_weights(banks):
    experts_of(banks)[0].down.weight = experts_of(banks)[1].down.weight = nn.Parameter(torch.randn(1, WIDTH_IN))
    experts_of(banks)[0].up = copy.deepcopy(experts_of(banks)[1].up)
    experts_of(banks)[0].down.bias = nn.Parameter(torch.zeros(1))


def with_other_strides(banks):
    linear = experts_of(banks)[2].up
    linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        cast,
        assign,
        reassign_data,
        replace,
        replace_expert,
        with_subclass,
        with_function,
        with_flat_memory,
        with_shared_memory,
        with_tied_weights,
        with_other_strides,
    ],
)
def test_parameters_may_be_moved_replaced_or_computed(change, already) -> None:
    banks = adapters(3, 1, 4)
    if already:
        run(banks)
    change(banks)
    assert_right(banks)
    run(banks).square().sum().backward()
    assert all(p.grad is not None for bank in banks for p in bank.parameters())


def test_copies_and_pickles_have_memory_of_their_own() -> None:
    banks = adapters(3, 1, 4)
    before = run(banks)
    for twins in (copy.deepcopy(banks), pickle.loads(pickle.dumps(banks))):
        with torch.no_grad():
            next(twins[0].parameters()).add_(1.0)
        assert torch.equal(run(banks), before)
        assert not torch.equal(run(twins), before)


def test_meta_parameters_wait_for_their_values() -> None:
    with torch.device("meta"):
        banks = adapters(3, 1, 4)
    values = adapters(3, 1, 4)
    for bank, value in zip(banks, values, strict=True):
        bank.load_state_dict(value.state_dict(), assign=True)
    assert torch.equal(run(banks), run(values))


def test_nothing_outlives_a_batch() -> None:
    """A thousand resident adapters cost their own memory, and that of no batch that has run."""
    gc.disable()
    try:
        banks = adapters(3, 1, 4)
        with torch.no_grad():
            kept = {}
            copied = weakref.ref(pack(banks, None, kept).arguments["w_down"])
            assert copied() is not None
            del kept
        assert copied() is None
    finally:
        gc.enable()


def test_threads_may_run_the_same_experts_together() -> None:
    banks = adapters(*range(1, 17))
    routes = torch.arange(16).unsqueeze(1)
    wanted = {k: expected(banks[k:], routes[: 16 - k]).detach() for k in range(8)}
    failed = []

    def serve(start: int) -> None:
        for i in range(30):
            k = (start + i) % 8
            with torch.no_grad():
                if not torch.allclose(run(banks[k:], routes[: 16 - k]), wanted[k], atol=1e-5):
                    failed.append(k)

    threads = [threading.Thread(target=serve, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
