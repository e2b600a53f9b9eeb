"""Arrow: PEFT's own where that runs, any ranks, experts that have nothing here, and files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import ArrowConfig
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import Tensor, nn

from mixadapters.core.bank import Weights
from mixadapters.core.context import ForwardContext
from mixadapters.core.routing import Routing
from mixadapters.routers import ArrowRouter, build_router
from mixadapters.routers.arrow import direction

NAMES, D = ["task_0", "task_1", "task_2", "task_3"], 12
TOKENS = torch.randn(2, 10, D, generator=torch.Generator().manual_seed(1))


def lora(rank: int, seed: int) -> Weights:
    """With one direction that stands out, to which PEFT's power iteration comes in its 15 steps."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([5.0, *[1.0] * (rank - 1)])
    down = torch.linalg.qr(torch.randn(D, rank, generator=generator)).Q.t()
    up = torch.linalg.qr(torch.randn(9, rank, generator=generator)).Q
    return Weights(down.contiguous() * sizes.unsqueeze(1), up)


def make(names: list[str] = NAMES, **options: Any) -> ArrowRouter:
    router = build_router({"kind": "arrow", **options}, D, names)
    assert isinstance(router, ArrowRouter)
    return router.eval()


def run(router: ArrowRouter) -> Routing:
    return router(TOKENS, ForwardContext())


def dense(routing: Routing) -> Tensor:
    return torch.zeros(20, len(NAMES)).scatter_add(1, routing.indices.clamp_min(0), routing.weights)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_outputs_equal_those_of_peft(k, temperature) -> None:
    experts = {name: lora(4, seed) for seed, name in enumerate(NAMES)}
    router = make(k=k, temperature=temperature)
    router.fit(experts)
    config = ArrowConfig(top_k=k, router_temperature=temperature, rng_seed=0)
    config.task_adapter_names, config.gks_adapter_names = NAMES, []
    theirs = ArrowLoraLinearLayer(D, config)
    lora_a, lora_b = nn.ModuleDict(), nn.ModuleDict()
    for name, expert in experts.items():
        lora_a[name], lora_b[name] = nn.Linear(D, 4, bias=False), nn.Linear(4, 9, bias=False)
        lora_a[name].weight.data, lora_b[name].weight.data = expert.down, expert.up
    theirs.build_prototypes(lora_a, lora_b)
    expected = theirs(TOKENS, lora_a, lora_b, nn.Identity(), dict.fromkeys(NAMES, 1.0))
    weights = dense(run(router))
    found = sum(
        w.unsqueeze(1) * (TOKENS.flatten(0, 1) @ e.down.t() @ e.up.t())
        for w, e in zip(weights.unbind(1), experts.values(), strict=True)
    )
    torch.testing.assert_close(found.view_as(expected), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rank", "out"), [(1, 9), (4, 9), (8, 3), (15, 20)])
def test_the_direction_is_the_first_right_singular_vector(rank, out) -> None:
    torch.manual_seed(0)
    down, up = torch.randn(rank, D), torch.randn(out, rank)
    expected = torch.linalg.svd(up.double() @ down.double()).Vh[0].float()
    found = direction(down, up)
    torch.testing.assert_close(found * (found @ expected).sign(), expected)
    assert not direction(down, torch.zeros(out, rank)).any()


def test_experts_of_any_rank_and_those_that_have_nothing_here() -> None:
    router = make(k=2)
    router.fit({"task_0": lora(1, 0), "task_1": None, "task_2": lora(8, 2), "task_3": None})
    routing = run(router)
    assert set(routing.indices.flatten().tolist()) == {0, 2}
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(20))
    router.fit({**dict.fromkeys(NAMES), "task_3": lora(2, 0)})
    routing = run(router)
    assert (routing.indices.sort(1).values == torch.tensor([-1, 3])).all()
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(20))


def test_a_router_that_has_not_been_fitted_says_so() -> None:
    router = make()
    router.path = "site"
    with pytest.raises(ValueError, match=r"router 'arrow' at 'site' has not been fitted.*fit"):
        run(router)
    with pytest.raises(ValueError, match=r"fit needs the weights of \['task_0'"):
        make().fit({"task_0": None})
    with pytest.raises(ValueError, match="TopKRouter is not made from the experts' weights"):
        build_router("top_k", D, NAMES).fit({})
    assert ArrowRouter.needs_fit
    assert not ArrowRouter.learns
    assert ArrowRouter.scopes == {"module"}


def test_prototypes_are_saved_and_nothing_trains_them() -> None:
    router, other = make(), make()
    router.fit({name: lora(3, seed) for seed, name in enumerate(NAMES)})
    assert not list(router.parameters())
    other.load_state_dict(router.state_dict())
    assert torch.equal(run(other).weights, run(router).weights)


def test_a_new_expert_waits_for_its_direction() -> None:
    router = make(k=4)
    experts: dict[str, Weights | None] = {name: lora(3, seed) for seed, name in enumerate(NAMES)}
    router.fit(experts)
    before = run(router)
    router.add_expert("task_4", 0.1)
    assert torch.equal(run(router).indices, before.indices)
    router.fit({**experts, "task_4": lora(2, 9)})
    assert (run(router).indices == 4).any()


def test_it_takes_no_options_of_training() -> None:
    for option in ("hidden", "normalize", "activation", "norm_topk_prob", "jitter", "convex"):
        with pytest.raises(ValueError, match=f"ArrowRouter takes no argument '{option}'"):
            make(**{option: 1})
