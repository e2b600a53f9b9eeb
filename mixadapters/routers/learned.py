"""Learned routers: score -> pool -> choose. `softmax` and `sigmoid` differ in how logits become weights.

Source: Diao et al. 2023 (arXiv 2306.05406), section 3.3 and appendix A. Granularities other than the paper's and the
causal forms are ours. Logits and weights are computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mixadapters.core.adapter import Site
from mixadapters.core.context import ForwardContext
from mixadapters.core.fields import finite
from mixadapters.core.registry import nearest
from mixadapters.core.routing import FROZEN, Routing
from mixadapters.routers.arms import ArmSurgery
from mixadapters.routers.pooling import GRANULARITIES, POOLINGS, POOLS
from mixadapters.routers.score import score, score_layers


class LearnedRouter(ArmSurgery):
    """Weights over the experts, per token, sequence, causal prefix or request.

    A router of a user's own overrides `choose` (logits -> Routing), `weigh` (logits -> weights of the arms) or
    `score`. Its constructor passes on what it does not name: `def __init__(self, *args, k=1, **options)`.

    Arms are the experts in order, then arms without expert ("null": what a removed domain leaves behind), then the
    frozen layer if `frozen_arm`. In a convex mixture that arm's weight is `Routing.base_weight`; otherwise it only
    takes mass from the experts.

    Args:
        hidden: widths of ReLU layers before the output; [] is a linear gate.
        granularity: one of GRANULARITIES. "sequence" pools over the whole sequence, so it is for encoders;
            "causal_prefix" pools the logits of positions up to each token; "request" pools the prompt, once.
        pool: one of POOLS, for "sequence". "last" reads the last position, padding or not (the released code).
        dropout: before each linear layer, in training.
        frozen_bias: initial logit of the frozen arm; a large one starts near the frozen model.
        normalize: scale the input to unit root mean square (gated FFNs have large outliers).
        convex: return the frozen arm's weight as `base_weight`.
        temperature: divides the logits.
        null_arms: how many arms without expert there are.

    Raises:
        ValueError: a value out of range, or an unknown granularity or pool.
    """

    frozen_arm = True

    def __init__(
        self,
        in_features: int,
        experts: list[str],
        *,
        hidden: Sequence[int] = (),
        granularity: str = "token",
        pool: str = "masked_mean",
        dropout: float = 0.0,
        frozen_bias: float = 0.0,
        normalize: bool = True,
        convex: bool = False,
        temperature: float = 1.0,
        null_arms: int = 0,
        **coefficients: float,
    ) -> None:
        super().__init__(in_features, experts, **coefficients)
        _one_of("granularity", granularity, GRANULARITIES)
        _one_of("pool", pool, POOLS)
        if isinstance(hidden, str) or not all(type(width) is int and width > 0 for width in hidden):
            raise ValueError(f"hidden={hidden!r} must be a list of positive widths, such as [768]")
        if not _finite(temperature) or temperature <= 0:
            raise ValueError(f"temperature={temperature!r} must be a finite number above 0, from 1e-30 to 1e30")
        if not _finite(dropout) or not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout!r} must be at least 0 and below 1")
        if not _finite(frozen_bias):
            raise ValueError(f"frozen_bias={frozen_bias!r} must be a finite number")
        if type(null_arms) is not int or null_arms < 0:
            raise ValueError(f"null_arms={null_arms!r} must be a number of arms")
        for name, value in (("normalize", normalize), ("convex", convex)):
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} must be True or False")
        self.normalize, self.convex, self.temperature, self.null_arms = normalize, convex, temperature, null_arms
        self.pooling = POOLINGS[granularity](pool)
        self.hidden, self.output = score_layers(in_features, hidden, len(self.arms), dropout)
        if self.has_frozen_arm:
            nn.init.constant_(self.output.bias[-1:], frozen_bias)

    def bind(self, site: Site) -> None:
        super().bind(site)
        self.pooling.path, self.pooling.stack = site.path, site.stack

    @property
    def refuses_packed(self) -> str | None:  # type: ignore[override]
        return None if self.granularity == "token" else f"gate_granularity={self.granularity!r}"

    @property
    def granularity(self) -> str:
        return self.pooling.granularity

    @property
    def has_frozen_arm(self) -> bool:
        return self.frozen_arm or self.convex

    @property
    def arms(self) -> list[str]:
        null = [f"null{i}" for i in range(self.null_arms)]
        return [*self.experts, *null, *([FROZEN] if self.has_frozen_arm else [])]

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        logits = self.pooling(self.score, tokens, context)  # (N, A)
        return self.choose(logits / self.temperature)._replace(logits=logits)

    def score(self, tokens: Tensor) -> Tensor:
        """tokens (..., d) -> logits (..., A), in float32 at least."""
        return score(tokens, self.hidden, self.output, self.normalize)

    def weigh(self, logits: Tensor) -> Tensor:
        """logits (N, A) -> weights (N, A)."""
        raise NotImplementedError

    def choose(self, logits: Tensor) -> Routing:
        """logits (N, A), divided by the temperature -> Routing."""
        weights = self.weigh(logits)
        count = len(self.experts)
        # What removed domains leave behind goes to the frozen layer, so that a softmax still sums to 1.
        base_weight = weights[:, count:].sum(1) if self.convex else None
        return Routing(weights=weights[:, :count], base_weight=base_weight, probs=weights)


DomainGate = LearnedRouter  # its name in MixDA


def _finite(value: Any) -> bool:
    return finite(value)


def _one_of(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {list(choices)}.{nearest(str(value), choices)}")
