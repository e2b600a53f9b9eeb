"""A trained mixture, cut for a part of what it has learned: whose statistics to prune by, and by which criterion."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from mixadapters import MoAConfig
from mixadapters.surgery import ExpertUsage, PruneCurve, prune_curve, record_usage

WIDTH, DOMAINS, RANK, STEPS, SEEDS = 16, 8, 2, 250, 3
TASK = (1, 6)  # the domains that the pruned model is for


class Layer(nn.Module):
    """One frozen linear layer, beside which the mixture sits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Domains:
    """Each domain has a place of its own, at which it maps x by a matrix of its own."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.centres = torch.randn(DOMAINS, WIDTH, generator=self.generator) * 2
        up = torch.randn(DOMAINS, WIDTH, RANK, generator=self.generator)
        down = torch.randn(DOMAINS, RANK, WIDTH, generator=self.generator)
        self.maps = up @ down / WIDTH**0.5

    def draw(self, count: int, among: tuple[int, ...] = tuple(range(DOMAINS))) -> tuple[Tensor, Tensor]:
        which = torch.tensor(among)[torch.randint(len(among), (count,), generator=self.generator)]
        x = self.centres[which] + torch.randn(count, WIDTH, generator=self.generator)
        return x, (self.maps[which] @ x.unsqueeze(-1)).squeeze(-1)


def trained(domains: Domains, seed: int) -> Any:
    torch.manual_seed(seed)
    config = MoAConfig(
        num_experts=DOMAINS, num_experts_per_tok=2, r=RANK, lora_alpha=RANK, target_modules=["linear"],
        router_aux_loss_coef=0.05, router_init_range=0.3,
    )  # fmt: skip
    model = get_peft_model(Layer(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(STEPS):
        x, y = domains.draw(256)
        optimizer.zero_grad()
        ((model(x) - y).square().mean() / y.square().mean()).backward()
        optimizer.step()
    return model.eval()


def used(model: Any, x: Tensor) -> ExpertUsage:
    with torch.no_grad(), record_usage(model) as usage:
        model(x)
    return usage


@pytest.fixture(scope="module")
def curves() -> list[dict[str, PruneCurve]]:
    """By seed: the error on the task's domains against the experts kept, for several statistics and criteria."""
    made = []
    for seed in range(SEEDS):
        domains = Domains(seed)
        model = trained(domains, seed)
        test_x, test_y = domains.draw(1000, TASK)

        @torch.no_grad()
        def error(model: nn.Module, x: Tensor = test_x, y: Tensor = test_y) -> float:
            return float((model(x) - y).square().mean() / y.square().mean())

        task, everything = used(model, domains.draw(1000, TASK)[0]), used(model, domains.draw(1000)[0])
        keeps = [4, 2, 1]
        made.append({
            "saliency": prune_curve(model, task, error, keeps),
            "usage": prune_curve(model, task, error, keeps, criterion="usage"),
            "random": prune_curve(copy.deepcopy(model), None, error, keeps, criterion="random", seed=seed),
            "global": prune_curve(model, everything, error, keeps),
        })  # fmt: skip
    return made


def at(curve: PruneCurve, keep: int) -> float:
    return next(point.value for point in curve.points if point.keep == keep)


def test_saliency_of_the_task_beats_random_and_global_statistics(curves: list[dict[str, PruneCurve]]) -> None:
    """With a quarter of the experts, in every seed; on the mean by a factor of five."""
    for by_name in curves:
        assert at(by_name["saliency"], 2) < at(by_name["random"], 2)
        assert at(by_name["saliency"], 2) < at(by_name["global"], 2)
    mean = {name: sum(at(one[name], 2) for one in curves) / SEEDS for name in curves[0]}
    assert 5 * mean["saliency"] < min(mean["random"], mean["global"])


def test_there_is_a_cliff(curves: list[dict[str, PruneCurve]]) -> None:
    """Two domains need two experts: down to these little is lost, and below them nearly all."""
    mean = [sum(one["saliency"].points[i].value for one in curves) / SEEDS for i in range(4)]  # 8, 4, 2, 1 experts
    assert mean[2] < 0.15
    assert mean[3] > 3 * mean[2]
