"""Cosine: direction alone, bounded logits."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from mixadapters.core.context import ForwardContext
from mixadapters.routers import build_router

TOKENS = torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(1))


def make(**options):
    torch.manual_seed(0)
    return build_router({"kind": "cosine", "projection": 5, "k": 2, **options}, 6, list("abcd")).eval()


def test_scores_are_scaled_cosines() -> None:
    router = make(normalize=False)
    projected = TOKENS @ router.hidden[-1].weight.t()
    cosines = torch.stack([F.cosine_similarity(projected, c, dim=-1) for c in router.output.weight], -1)
    torch.testing.assert_close(router.score(TOKENS), 2 * cosines)
    torch.testing.assert_close(router.score(TOKENS * 7), 2 * cosines)


def test_logits_are_bounded_by_100() -> None:
    router = make()
    with torch.no_grad():
        router.log_scale.weight.fill_(50.0)
    logits = router.score(TOKENS * 1e6)
    assert logits.abs().max() <= 100 * (1 + 1e-5)
    assert logits.abs().max() > 50


def test_scale_is_learned_from_2() -> None:
    router = make()
    assert math.isclose(float(router.log_scale.weight.detach().exp()), 2.0, rel_tol=1e-6)
    router(TOKENS, ForwardContext()).weights.square().sum().backward()
    assert router.log_scale.weight.grad.any()
    assert router.hidden[-1].weight.shape == (5, 6)
