"""The contract of `Router`, over every entry of ROUTERS: a new one is tested from the day it is registered."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig

from mixadapters import ROUTERS, Router
from mixadapters.core.adapter import Site
from mixadapters.core.bank import AdapterBank, Weights
from mixadapters.core.cache import router_state
from mixadapters.core.context import ForwardContext
from mixadapters.core.mixture import Mixture
from mixadapters.core.record import Record
from mixadapters.core.routing import Routing, RoutingKey
from mixadapters.core.streams import Stream
from mixadapters.core.usage import UsageRecorder
from mixadapters.routers import ConstantRouter, CountsRouter, LearnedRouter, SingleRouter, build_router
from mixadapters.routers.base import options_of

NAMES = sorted(name for name in ROUTERS if not name.startswith("toy_"))
BATCH, LENGTH, WIDTH, VOCABULARY = 2, 3, 8, 11
EXPERTS = {"single": ["a"]}  # the others take any number
OPTIONS: dict[str, dict[str, Any]] = {  # what a router needs to be told, to be as soft as others
    "counts": {"vocab_size": VOCABULARY},
    "pregate": {"vocab_size": VOCABULARY},
    "tree": {"gamma": 10.0},
}
BY_BATCH = ("modality", "task")  # the batch says where rows go, and not the tokens
BY_IDS = ("counts", "hash", "pregate")  # ids of tokens, and not hidden states
SEES_THE_SEQUENCE = ("expert_choice",)  # refused on causal models
ONE_LAYER = LlamaConfig(hidden_size=2, num_hidden_layers=1, num_attention_heads=1)
every_router = pytest.mark.parametrize("name", NAMES)


def experts_of(name: str) -> list[str]:
    return EXPERTS.get(name, ["a", "b", "c"])


def expert_weights(names: list[str], width: int = WIDTH) -> dict[str, Weights | None]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {name: Weights(draw(rank, width), draw(5, rank)) for rank, name in enumerate(names, 2)}


def made(name: str, experts: list[str] | None = None, **arguments: Any) -> Router:
    """With weights that make a difference."""
    experts = experts_of(name) if experts is None else experts
    router = build_router({"kind": name, **OPTIONS.get(name, {}), **arguments}, WIDTH, experts)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if router.needs_fit:
        router.fit(expert_weights(experts))
    if isinstance(router, CountsRouter):
        router.table.fit({arm: torch.arange(VOCABULARY) * (i + 1) % 7 for i, arm in enumerate(router.arms, 1)})
    return router.eval()


@dataclass
class Batch:
    """Sequences as a model gives them to a router."""

    tokens: Tensor  # (B, T, d)
    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool
    modality_ids: Tensor  # (B, T)
    expert_ids: Tensor  # (B,)

    def context(self, training: bool = False, cache: Any = None, past: int = 0, **about: Any) -> ForwardContext:
        context = ForwardContext()
        values = {"modality_ids": self.modality_ids, "expert_ids": self.expert_ids, **about.pop("values", {})}
        record = Record(training, True, open=True, inputs={"input_ids": self.ids}, values=values)
        record.streams[""] = Stream(*self.ids.shape, self.mask, None, cache, past, input_ids=self.ids, **about)
        context.enter(record)
        return context

    def rows(self, rows: list[int]) -> Batch:
        return Batch(*(value[rows] for value in vars(self).values()))

    def columns(self, columns: slice | list[int]) -> Batch:
        """Some of the tokens of each row."""
        by_token = {n: v[:, columns] for n, v in vars(self).items() if n != "expert_ids"}
        return Batch(**by_token, expert_ids=self.expert_ids)

    def changed(self, where: Tensor, seed: int = 5) -> Batch:
        """With other contents at the tokens (B, T) of `where`."""
        other = batch_of(*self.ids.shape, seed=seed)
        tokens = torch.where(where.unsqueeze(-1), other.tokens * 9, self.tokens)
        ids = torch.where(where, other.ids, self.ids)
        return replace(self, tokens=tokens, ids=ids)


def batch_of(rows: int = BATCH, length: int = LENGTH, seed: int = 0, padding: tuple[int, ...] = ()) -> Batch:
    """padding: how many tokens of each row are, on the right; on the left where negative."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: torch.randint(high, (rows, length), generator=generator)  # noqa: E731
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row, count in enumerate(padding):
        mask[row, length - count :] = count <= 0
        mask[row, : max(-count, 0)] = False
    tokens = torch.randn(rows, length, WIDTH, generator=generator)
    return Batch(tokens, draw(VOCABULARY), mask, draw(3), draw(3)[:, 0])


def context_of(training: bool = False, **values: Any) -> ForwardContext:
    return batch_of(padding=(0, 1)).context(training, values=values)


def tokens_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return batch_of(seed=seed).tokens.to(dtype)


def dense(routing: Routing, rows: int, experts: int) -> Tensor:
    """(N, E) weights, whatever the form."""
    weights = routing.weights
    if routing.indices is None:
        return torch.ones(rows, experts) if weights is None else weights
    weights = torch.ones(routing.indices.shape) if weights is None else weights
    chosen = routing.indices >= 0
    return torch.zeros(rows, experts).scatter_add(1, routing.indices.clamp_min(0), weights * chosen)


def run(router: Router, batch: Batch, **about: Any) -> Tensor:
    """(B, T, E) weights."""
    routing = router(batch.tokens, batch.context(**about))
    return dense(routing, batch.ids.numel(), len(router.experts)).view(*batch.ids.shape, -1)


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
    one, other = router(tokens_of(), context), router(tokens_of(), context_of())
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
    if router.shares:  # what it has from an earlier layer
        router(tokens, context)
    weights = dense(router(tokens, context), 6, count)
    parameters = list(router.parameters())
    if not parameters:
        assert weights.requires_grad == (name == "arrow")  # to the tokens
        return
    (weights * torch.randn(6, count)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
    assert name in BY_IDS or tokens.grad.abs().max() > 0


@every_router
def test_constant_weights_are_those_of_every_input(name) -> None:
    router, count = made(name), len(experts_of(name))
    constant = router.constant()
    weights = [dense(router(tokens_of(seed), context_of()), 6, count) for seed in (0, 1)]
    if constant is None:
        assert torch.equal(*weights) is (name in (*BY_BATCH, *BY_IDS))
    else:
        assert len(constant) == count
        for seen in weights:
            torch.testing.assert_close(seen, torch.tensor(constant).expand(6, -1))
    if router.always_first:
        assert constant == [1.0]


@every_router
def test_router_is_built_from_its_name_copied_and_saved(name) -> None:
    router = build_router({"kind": name, **OPTIONS.get(name, {})}, WIDTH, experts_of(name))
    assert type(router) is ROUTERS[name]
    assert isinstance(router, Router)
    assert (router.in_features, router.experts) == (WIDTH, experts_of(name))
    one, count = made(name), len(experts_of(name))
    other = build_router({"kind": name, **OPTIONS.get(name, {})}, WIDTH, experts_of(name)).eval()
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
    build_router(
        {"kind": name, **OPTIONS.get(name, {})}, WIDTH, experts_of(name), hiden=3
    )  # defaults are for those that take them


GRANULARITIES = [
    (name, granularity)
    for name in NAMES
    for granularity in ("token", "causal_prefix", "request", "sequence")
    if "granularity" in options_of(ROUTERS[name]) or granularity == "token"
]
every_granularity = pytest.mark.parametrize(("name", "granularity"), GRANULARITIES)


def grained(name: str, granularity: str, **options: Any) -> Router:
    """A router of this granularity, where it has one."""
    has = "granularity" in options_of(ROUTERS[name])
    return made(name, **({"granularity": granularity} if has else {}), **options)


@pytest.mark.parametrize("side", [1, -1], ids=["right", "left"])
@every_granularity
def test_what_is_in_padding_and_how_much_there_is_never_matters(name, granularity, side) -> None:
    router = grained(name, granularity)
    batch = batch_of(3, 6, padding=(0, side * 2, side * 4))
    weights = run(router, batch)
    others = run(router, batch.changed(~batch.mask))
    torch.testing.assert_close(others[batch.mask], weights[batch.mask])
    for row in range(3):
        alone = batch.rows([row])
        alone = alone.columns(alone.mask[0].nonzero().flatten().tolist())
        torch.testing.assert_close(run(router, alone)[0], weights[row][batch.mask[row]])


@every_granularity
def test_the_other_rows_of_a_batch_and_their_order_never_matter(name, granularity) -> None:
    router, batch = grained(name, granularity), batch_of(4, 5, padding=(0, 1, 2, 0))
    weights = run(router, batch)
    order = [2, 0, 3]
    torch.testing.assert_close(run(router, batch.rows(order)), weights[order])


@every_granularity
def test_no_token_sees_a_later_one_where_a_model_is_causal(name, granularity) -> None:
    site = Site("ffn_output", "site", WIDTH, WIDTH, causal=True)
    if name in SEES_THE_SEQUENCE:
        with pytest.raises(ValueError, match="see"):
            made(name).bind(site)
        return
    if granularity in ("sequence", "request"):  # refused or pooled by the model and the prompt: tests of the gate
        return
    router, batch = grained(name, granularity), batch_of(2, 6)
    router.bind(site)
    weights = run(router, batch)
    for t in range(1, 6):
        later = torch.arange(6).expand(2, -1) >= t
        assert torch.equal(run(router, batch.changed(later))[:, :t], weights[:, :t])


@pytest.mark.parametrize("split", [[3, 1, 1, 1], [1] * 6, [4, 2]])
@every_granularity
def test_decoding_with_a_cache_equals_the_whole(name, granularity, split) -> None:
    if name in SEES_THE_SEQUENCE or granularity in ("sequence", "request"):
        return
    router, batch, cache, past = grained(name, granularity), batch_of(2, 6, padding=(0, -2)), None, 0
    cache = DynamicCache(config=ONE_LAYER)
    whole, pieces = run(router, batch), []
    for length in split:
        columns = slice(past, past + length)
        pieces.append(run(router, batch.columns(columns), cache=cache, past=past))
        cache.update(torch.zeros(2, 1, length, 2), torch.zeros(2, 1, length, 2), 0)
        past += length
    torch.testing.assert_close(torch.cat(pieces, 1)[batch.mask], whole[batch.mask])


@every_router
def test_requests_packed_into_one_row_are_routed_alike_or_refused(name) -> None:
    router, batch = made(name), batch_of(2, 5)
    if router.refuses_packed is not None or name in BY_BATCH:  # fields of a batch are refused by the model
        return
    packed = Batch(*(v.reshape(1, 10, *v.shape[2:]) if v.dim() > 1 else v[:1] for v in vars(batch).values()))
    torch.testing.assert_close(run(router, packed, packed=True).view(2, 5, -1), run(router, batch))


@every_granularity
def test_losses_are_finite_positive_and_never_of_padding(name, granularity) -> None:
    coefficients = {"balance_coef": 2.0, "z_coef": 3.0, "entropy_coef": 5.0, "importance_coef": 7.0}
    if not made(name).arms or not list(made(name).parameters()):
        return
    router = grained(name, granularity, **coefficients).train()
    batch = batch_of(3, 4, padding=(0, 1, 2))
    found = []
    for one in (batch, batch.changed(~batch.mask)):
        context = one.context(training=True, values={"prompt_mask": batch.mask})
        torch.manual_seed(0)  # of noise
        mixture(router).route(one.tokens, context)
        found.append(context.record.losses)
    assert set(found[0]) == {"balance", "z", "entropy", "importance"}
    assert all(loss.isfinite() and loss > 0 for loss in found[0].values())
    torch.testing.assert_close(found[0], found[1])
    sum(found[0].values()).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in router.parameters())


def mixture(router: Router, width: int = WIDTH) -> Mixture:
    bank = AdapterBank(width, width)
    for expert in router.experts:
        bank.add(expert, 2, init_weights=False)
    made = Mixture(router, bank)
    made.key = RoutingKey("default", "ffn", 0, "site")
    return made


@every_router
def test_observers_and_usage_know_the_arms_by_name(name) -> None:
    router, batch, usage = made(name), batch_of(padding=(0, 1)), UsageRecorder()
    context = batch.context()
    context.observers.append(usage)
    mixture(router).route(batch.tokens, context)
    ((_, arms),) = usage.seen
    assert arms in (tuple(router.arms), (*router.experts, "frozen"))
    summary = usage.summaries()[RoutingKey("default", "ffn", 0, "site")]
    weights = run(router, batch)[batch.mask]
    for i, expert in enumerate(router.experts):
        if router(batch.tokens, batch.context()).probs is None:
            assert summary[f"weight/{expert}"] == pytest.approx(float(weights[:, i].mean()), abs=1e-6)
    assert usage.count(RoutingKey("default", "ffn", 0, "site")) == int(batch.mask.sum())


@every_router
def test_experts_come_and_go_or_the_reason_is_said(name) -> None:
    options = {"threshold": 0.1} if name == "dense_to_sparse" else {}  # which else depends on how many there are
    router, batch = made(name, **options), batch_of(3, 4)
    if router.fixed_experts is not None:
        for verb in (lambda: router.add_expert("d", 0.1), lambda: router.remove_expert("a", False)):
            with pytest.raises(ValueError, match=ROUTERS[name].__name__):
                verb()
        return
    if not hasattr(router, "add_expert"):
        assert name in ("single", "constant", "modality")
        return
    if name == "task":  # numbers are those of places: a test of its own
        return
    before = run(router, batch)
    router.reorder(["c", "a", "b"])
    assert router.experts == ["c", "a", "b"]
    torch.testing.assert_close(run(router, batch), before[..., [2, 0, 1]])
    router.reorder(["a", "b", "c"])
    router.add_expert("d", 1e-9)
    assert router.experts == ["a", "b", "c", "d"]
    if name not in ("counts", *SEES_THE_SEQUENCE):  # it asks for its text first; more experts take fewer tokens each
        torch.testing.assert_close(run(router, batch)[..., :3], before)
    router.remove_expert("d", True)
    torch.testing.assert_close(run(router, batch), before)
    with pytest.raises(ValueError, match="'a'"):
        router.add_expert("a", 0.1)
    router.remove_expert("b", False)
    assert router.experts == ["a", "c"]
    if name not in SEES_THE_SEQUENCE:
        torch.testing.assert_close(run(router, batch), before[..., [0, 2]])


@every_router
def test_what_may_change_in_training_is_set_by_name_and_checked(name) -> None:
    router = made(name)
    for option in router.scheduled:
        assert option in options_of(type(router)), option
        with pytest.raises(ValueError, match=option):
            router.set_option(option, "much")
        with pytest.raises(ValueError, match=option):
            router.set_option(option, float("nan"))
    with pytest.raises(ValueError, match="has no option 'hiden'"):
        router.set_option("hiden", 3)


@every_router
def test_router_says_for_how_many_layers_it_may_decide(name) -> None:
    assert "module" in ROUTERS[name].scopes or name == "counts"
    assert ROUTERS[name].scopes
    assert ROUTERS[name].scopes <= {"module", "block", "model"}


@pytest.mark.parametrize("spec", ["sotfmax", {"kind": "sotfmax"}])
def test_unknown_router_is_told_the_nearest(spec) -> None:
    with pytest.raises(ValueError, match=r"unknown router 'sotfmax'.*Did you mean 'softmax'\?"):
        build_router(spec, WIDTH, ["a"])


def test_specification_needs_a_kind() -> None:
    with pytest.raises(ValueError, match=r"needs a 'kind'; have \['arrow'"):
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


# --- what the page of MoA says of them ----------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "moa.md"
PASSED_ON = ("self", "in_features", "experts", "first", "options", "coefficients")


def rows_of(heading: str) -> dict[str, list[str]]:
    """The cells of a table of the page, by the name in its first column."""
    table = PAGE.read_text(encoding="utf-8").split(f"| router | {heading}", 1)[1].split("\n\n", 1)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0].strip("`"): row[1:] for row in cells}


def is_refused_where_causal(name: str) -> bool:
    try:
        made(name).bind(Site("ffn_output", "site", WIDTH, WIDTH, causal=True))
    except ValueError:
        return True
    return False


def keeps_state(name: str) -> list[str]:
    """The granularities with which it leaves something in the key-value cache."""
    found = []
    for granularity in [g for other, g in GRANULARITIES if other == name and g != "sequence"]:
        batch, cache = batch_of(2, 4), DynamicCache(config=ONE_LAYER)
        cache.update(torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2), 0)
        run(grained(name, granularity), batch, cache=cache, values={"prompt_mask": batch.mask})
        found += [granularity] if router_state(cache) else []
    return found


def test_page_has_every_router_in_both_tables() -> None:
    assert sorted(rows_of("what it does")) == sorted(rows_of("file")) == NAMES


@every_router
def test_page_says_what_a_router_is_made_of(name) -> None:
    cls = ROUTERS[name]
    file = Path(inspect.getfile(cls))
    own = inspect.signature(cls.__init__).parameters if "__init__" in cls.__dict__ else ()
    tests = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.stem == f"test_{file.stem}"]
    assert rows_of("file")[name] == [
        f"`routers/{file.name}`",
        ", ".join(f"`{option}`" for option in own if option not in PASSED_ON) or "none",
        "no: refused" if is_refused_where_causal(name) else "yes",
        ", ".join(keeps_state(name)) or "none",
        f"`tests/routers/{tests[0]}`" if tests else "the contract",
    ]
