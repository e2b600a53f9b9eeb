from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mixadapters.core import arena
from mixadapters.core.bank import AdapterBank, Expert, concatenate, pack, tie
from mixadapters.core.routing import Routing

WIDTH_IN, WIDTH_OUT = 6, 5
FORMS = {
    "low rank": {"bias": False, "activation": "identity"},
    "bottleneck": {},
    "gated": {"glu": True, "activation": "silu"},
    "scaled": {"scale": 0.5},
}
ROUTES = torch.tensor([[0], [2], [-1], [1], [0]])


def bank_of(*ranks: int, seed: int = 0, **form) -> AdapterBank:
    bank = AdapterBank(WIDTH_IN, WIDTH_OUT, **form)
    for i, rank in enumerate(ranks):
        bank.add(f"expert{i}", rank, init_weights=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return bank


def adapters(*ranks: int, **form) -> list[AdapterBank]:
    """Banks of one expert each."""
    return [bank_of(rank, seed=i, **form) for i, rank in enumerate(ranks)]


def experts_of(banks: list[AdapterBank]) -> list[Expert]:
    return [expert for bank in banks for expert in bank.experts.values()]


def run(banks: list[AdapterBank], routes: Tensor = ROUTES, seed: int = 0) -> Tensor:
    x = torch.randn(len(routes), WIDTH_IN, generator=torch.Generator().manual_seed(seed)).to(dtype_of(banks))
    packed = pack(banks, None)
    return packed(x, packed.placed(Routing(routes), len(x)))


def expected(banks: list[AdapterBank], routes: Tensor = ROUTES, seed: int = 0) -> Tensor:
    """By concatenation of the parameters as they are."""
    x = torch.randn(len(routes), WIDTH_IN, generator=torch.Generator().manual_seed(seed)).to(dtype_of(banks))
    return concatenate(banks, None)(x, Routing(routes))


def dtype_of(banks: list[AdapterBank]) -> torch.dtype:
    return next(banks[0].parameters()).dtype


def assert_tied(banks: list[AdapterBank]) -> None:
    """A call concatenates nothing, every parameter lies in a block, and the result is that of the parameters."""
    torch.testing.assert_close(run(banks), expected(banks))
    tied = tie(banks)
    assert tied is not None
    home = experts_of(banks)[0].arena
    for argument, block in tied.pack().arguments.items():
        if isinstance(block, Tensor) and argument != "scale":
            whole = home.blocks[argument]
            assert block.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    for expert in experts_of(banks):
        assert expert.arena is home
        for part, (module, name) in arena.PARTS.items():
            leaf = getattr(getattr(expert, module), name, None)
            if leaf is not None:
                place = home.blocks[part][expert.slot.piece(part)]
                assert (leaf.data_ptr(), leaf.shape, leaf.stride()) == (place.data_ptr(), place.shape, place.stride())


def assert_untied(banks: list[AdapterBank]) -> None:
    torch.testing.assert_close(run(banks), expected(banks))
    assert tie(banks) is None


# --- what is shared, and what is not -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_adapters_that_run_together_share_their_memory(form) -> None:
    banks = adapters(3, 1, 4, **FORMS[form])
    before = [{k: v.clone() for k, v in bank.state_dict().items()} for bank in banks]
    leaves = [p for bank in banks for p in bank.parameters()]
    assert_tied(banks)
    assert all(a is b for a, b in zip(leaves, (p for bank in banks for p in bank.parameters()), strict=True))
    for bank, old in zip(banks, before, strict=True):
        for name, tensor in bank.state_dict().items():
            assert torch.equal(tensor, old[name])
            assert tensor.shape == old[name].shape
            assert tensor.untyped_storage().nbytes() == tensor.numel() * 4  # a storage of its own


def test_experts_of_one_bank_share_theirs() -> None:
    bank = bank_of(3, 2, 4)
    x, weights = torch.randn(4, WIDTH_IN), torch.rand(4, 3)
    torch.testing.assert_close(
        bank(x, Routing(weights=weights), None), concatenate([bank], None)(x, Routing(weights=weights))
    )
    assert_tied([bank])


def test_one_expert_needs_no_arena() -> None:
    bank = bank_of(3)
    run([bank], torch.tensor([[0], [-1]]))
    assert experts_of([bank])[0].arena is None


@pytest.mark.parametrize("form", [{"layer_norm": True}, {"scale": None}])
def test_computed_weights_are_concatenated(form) -> None:
    assert_untied(adapters(3, 2, 4, **form))


def test_nothing_is_concatenated_or_copied_in_later_calls(monkeypatch) -> None:
    banks = adapters(3, 1, 4)
    run(banks)

    def refuse(*_, **__):
        raise AssertionError("a copy")

    monkeypatch.setattr(torch, "cat", refuse)
    monkeypatch.setattr(torch, "stack", refuse)
    monkeypatch.setattr(arena.Slot, "take", refuse)
    for _ in range(3):
        run(banks)


def test_batches_of_other_adapters_look_at_no_parameter_twice(monkeypatch) -> None:
    banks = adapters(3, 1, 4, 2)
    run(banks)

    def refuse(*_):
        raise AssertionError("put together again")

    monkeypatch.setattr(arena, "_put_together", refuse)
    for order in ([0, 1, 2], [3, 1, 0], [2, 0, 3, 1], [0, 1, 2, 3]):
        assert_tied([banks[i] for i in order])


def test_slot_that_its_arena_has_given_up_is_not_believed() -> None:
    banks = adapters(3, 1, 4)
    before = run(banks)
    expert = experts_of(banks)[2]
    stale = arena.Slot(0, 0, expert.rank)
    stale.addresses = expert.slot.addresses  # as if memory that was freed had come back
    expert.slot = stale
    assert not expert.arena.holds(expert)
    assert torch.equal(run(banks), before)


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


def test_only_adapters_of_the_batch_get_a_gradient() -> None:
    banks = adapters(3, 1, 4, 2)
    run(banks).sum()
    some = [banks[0], banks[2]]
    run(some, torch.tensor([[0], [1], [-1]])).square().sum().backward()
    assert all(p.grad is not None for bank in some for p in bank.parameters())
    assert all(p.grad is None for bank in (banks[1], banks[3]) for p in bank.parameters())


def test_frozen_parameters_get_none() -> None:
    banks = adapters(3, 1, 4)
    banks[1].requires_grad_(False)
    run(banks).square().sum().backward()
    assert all(p.grad is None for p in banks[1].parameters())
    assert all(p.grad is not None for p in banks[0].parameters())


def test_optimizers_of_single_adapters_write_the_blocks() -> None:
    banks = adapters(3, 1, 4)
    twins = copy.deepcopy(banks)
    for group, function in ((banks, run), (twins, expected)):
        optimizers = [torch.optim.AdamW(bank.parameters(), lr=0.1 * (i + 1)) for i, bank in enumerate(group)]
        for step in range(3):
            function(group, seed=step).square().sum().backward()
            optimizers[step].step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    torch.testing.assert_close(run(banks), expected(twins))
    assert_tied(banks)


def test_fused_optimizers_see_no_change_of_memory() -> None:
    """They walk a parameter and its moments side by side in memory: strides may not change in between."""
    banks = adapters(3, 1, 4)
    twins = copy.deepcopy(banks)
    for group, function, fused in ((banks, run, True), (twins, expected, False)):
        parameters = [p for bank in group for p in bank.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
        for step in range(4):  # alone at first, then together
            optimizer.zero_grad()
            (expected if step < 2 else function)(group, seed=step).square().sum().backward()
            optimizer.step()
    assert_tied(banks)
    torch.testing.assert_close(run(banks), expected(twins))


def test_another_adapter_may_step_between_forward_and_backward_but_not_one_of_the_batch() -> None:
    banks = adapters(3, 1, 4)
    run(banks)
    some = banks[:2]
    loss = run(some, torch.tensor([[0], [1]])).square().sum()
    with torch.no_grad():
        next(banks[2].parameters()).add_(1.0)
    loss.backward()
    loss = run(some, torch.tensor([[0], [1]])).square().sum()
    with torch.no_grad():
        next(banks[1].parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_newcomer_between_forward_and_backward_changes_nothing() -> None:
    banks = adapters(3, 1, 4)
    twins = copy.deepcopy(banks)
    loss = run(banks).square().sum()
    assert_tied([*banks, *adapters(7, 7)])  # the blocks grow
    loss.backward()
    expected(twins).square().sum().backward()
    for one, other in zip(banks, twins, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


# --- coming and going --------------------------------------------------------------------------------------------


def test_adapters_come_and_go_and_space_is_reused() -> None:
    banks = adapters(4, 3, 3)
    assert_tied(banks)
    home = experts_of(banks)[0].arena
    banks += adapters(3, 3)
    assert_tied(banks)  # the blocks have grown
    room, blocks = home.room, {part: block.data_ptr() for part, block in home.blocks.items()}
    for _ in range(20):
        del banks[1]
        banks.append(bank_of(3, seed=9))
        assert_tied(banks)
        assert experts_of(banks)[0].arena is home
        assert home.room == room
        assert {part: block.data_ptr() for part, block in home.blocks.items()} == blocks


def test_space_in_use_elsewhere_is_not_given_away() -> None:
    """An optimizer that holds the parameters of a removed adapter goes on writing to them."""
    banks = adapters(3, 3, 4)
    run(banks)
    held = list(banks[1].parameters())
    del banks[1]
    banks.append(bank_of(3, seed=9))
    assert_tied(banks)
    before = run(banks)
    with torch.no_grad():
        for p in held:
            p.fill_(100.0)
    assert torch.equal(run(banks), before)


def test_memory_is_given_back_with_the_last_adapter() -> None:
    gc.disable()
    try:
        banks = adapters(3, 1, 4)
        run(banks)
        home = weakref.ref(experts_of(banks)[0].arena)
        banks.clear()
        assert home() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("order", [[2, 0, 1], [0, 2, 1], [1, 2, 0]])
def test_any_subset_in_any_order_names_its_own_experts(order) -> None:
    banks = adapters(3, 1, 4, 2, 5)
    run(banks)
    assert_tied([banks[i] for i in order])
    assert_tied([banks[i + 2] for i in order])
    mixed = [bank_of(2, 3, seed=7), banks[4], banks[0]]
    routes = torch.tensor([[0], [1], [2], [3], [-1]])
    torch.testing.assert_close(run(mixed, routes), expected(mixed, routes))
    alone = bank_of(3, 2, 4)  # a bank whose experts do not stand in order
    run([alone])
    alone.remove("expert0")
    alone.add("again", 3, init_weights=False)
    x = torch.randn(4, WIDTH_IN)
    torch.testing.assert_close(alone(x, Routing(), None), concatenate([alone], None)(x, Routing()))


def test_separate_arenas_become_one() -> None:
    first, second = adapters(3, 1, 4), adapters(2, 2)
    run(first)
    run(second, torch.tensor([[0], [1]]))
    for _ in range(3):
        assert_tied([second[0], *first])
        assert_tied([*first, *second])
    assert len({id(expert.arena) for expert in experts_of([*first, *second])}) == 1


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


def wrap_same_memory(banks):
    """A new parameter on the old memory, as code that switches requires_grad does."""
    for module in [m for bank in banks for m in bank.modules() if isinstance(m, nn.Linear)]:
        module.weight = nn.Parameter(module.weight.data)
        module.bias = nn.Parameter(module.bias.data)
    gc.collect()


def replace_expert(banks):
    banks[1].remove("expert0")
    banks[1].add("expert0", 1, init_weights=False)


def load_in_place(banks):
    for bank in banks:
        bank.load_state_dict({k: v * 2 for k, v in bank.state_dict().items()})


@pytest.mark.parametrize(
    "change", [cast, assign, reassign_data, replace, wrap_same_memory, replace_expert, load_in_place]
)
def test_parameters_that_moved_are_brought_back(change) -> None:
    banks = adapters(3, 1, 4)
    run(banks)
    change(banks)
    assert_tied(banks)
    assert_tied([*banks, bank_of(1, seed=8).to(dtype_of(banks))])
    assert_tied(banks)
    with torch.no_grad():
        for bank in banks:
            for p in bank.parameters():
                p.mul_(2.0)
    assert_tied(banks)


def test_swapping_to_and_fro_takes_no_more_memory() -> None:
    banks = adapters(3, 1, 4)
    run(banks)
    home = experts_of(banks)[0].arena
    for _ in range(10):
        reassign_data(banks)
        assert_tied(banks)
    assert len(home.slots) <= 4


def test_copies_and_pickles_have_memory_of_their_own() -> None:
    banks = adapters(3, 1, 4)
    before = run(banks)
    for twins in (copy.deepcopy(banks), pickle.loads(pickle.dumps(banks))):
        assert experts_of(twins)[0].arena is None
        with torch.no_grad():
            next(twins[0].parameters()).add_(1.0)
        assert torch.equal(run(banks), before)
        assert_tied(twins)
        assert not torch.equal(run(twins), before)
    assert torch.equal(run(banks), before)


def test_files_hold_one_adapter_each() -> None:
    banks = adapters(*[3] * 50, bias=False)
    run(banks)
    state = banks[7].state_dict()
    stored = load(save({name: tensor.contiguous() for name, tensor in state.items()}))
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert len(buffer.getvalue()) < 4000  # and not the whole block


def test_meta_parameters_wait_for_their_values() -> None:
    with torch.device("meta"):
        banks = adapters(3, 1, 4)
    assert tie(banks) is None
    values = adapters(3, 1, 4)
    for bank, value in zip(banks, values, strict=True):
        bank.load_state_dict(value.state_dict(), assign=True)
    assert_tied(banks)
    assert torch.equal(run(banks), run(values))


# --- parameters that cannot be moved -----------------------------------------------------------------------------


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
    """Moments of a fused optimizer lie as the parameter lay when it made them."""
    linear = experts_of(banks)[2].up
    linear.weight = nn.Parameter(linear.weight.detach().contiguous())


def with_two_dtypes(banks):
    banks[1].to(torch.float64)


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        with_subclass,
        with_function,
        with_flat_memory,
        with_shared_memory,
        with_tied_weights,
        with_other_strides,
        with_two_dtypes,
    ],
)
def test_what_cannot_be_moved_is_concatenated(change, already) -> None:
    banks = adapters(3, 1, 4)
    if already:
        run(banks)
    change(banks)
    where = [p.data_ptr() for bank in banks for p in bank.parameters()]
    assert_untied(banks)
    run(banks).square().sum().backward()
    assert all(p.grad is not None for bank in banks for p in bank.parameters())
    assert [p.data_ptr() for bank in banks for p in bank.parameters()] == where


def test_inference_mode_neither_ties_in_inference_tensors_nor_forgets_training() -> None:
    banks = adapters(3, 1, 4)
    with torch.inference_mode():
        run(banks)
    assert_tied(banks)
    run(banks).square().sum().backward()
    with torch.inference_mode():
        born = adapters(3, 1, 4)
        assert_untied(born)


def test_threads_may_bring_the_same_experts_together() -> None:
    banks = adapters(*range(1, 17))
    routes = torch.arange(16).unsqueeze(1)
    wanted, failed = expected(banks, routes), []

    def serve(start: int) -> None:
        for i in range(30):
            some = banks[(start + i) % 8 :]
            with torch.no_grad():
                if not torch.allclose(run(some, routes[: len(some)]), wanted_of[len(some)], atol=1e-5):
                    failed.append(len(some))

    wanted_of = {len(banks[k:]): expected(banks[k:], routes[: len(banks[k:])]).detach() for k in range(8)}
    threads = [threading.Thread(target=serve, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert torch.equal(expected(banks, routes), wanted)
